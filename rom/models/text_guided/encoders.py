"""Descriptions of classes to text features: encoders of other packages when they are there, hashed n-grams without.

An encoder is a function from a list of texts to a floating tensor `[texts, E]`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rom.models.text_guided.features import TextFeatures, as_text_features

Encoder = Callable[[list[str]], torch.Tensor]


def text_features(descriptions: Mapping[str, Sequence[str]], encoder: Encoder, source: str = "") -> TextFeatures:
    """The mean embedding of every class's descriptions, in the classes' order, as the paper does with CLIP and GPT-3.

    source: in words; the encoder's own `source` by default. ValueError: a class without descriptions.

    >>> from rom.models import text_guided
    >>> animals = {"cat": ["a small animal that purrs", "whiskers"], "dog": ["a small animal that barks"]}
    >>> found = text_guided.text_features(animals, text_guided.hashed_encoder(64))
    >>> found.table.shape, found.source
    (torch.Size([2, 64]), 'hashed n-grams of descriptions (not CLIP)')
    """
    if empty := [name for name, texts in descriptions.items() if not texts or isinstance(texts, str)]:
        raise ValueError(f"text_features: expected a list of descriptions for every class, got none for {empty[0]!r}.")
    flat = [text for texts in descriptions.values() for text in texts]
    with torch.no_grad():
        embedded = encoder(flat).detach().float().cpu()
    if embedded.dim() != 2 or len(embedded) != len(flat):
        raise ValueError(f"text_features: expected [{len(flat)}, width] of the encoder, got {list(embedded.shape)}.")
    parts = embedded.split([len(texts) for texts in descriptions.values()])
    table = torch.stack([part.mean(0) for part in parts])
    return as_text_features(TextFeatures(table, source or getattr(encoder, "source", "an encoder")))


# ------------------------------------------------------------------------------------------------ without downloads
class HashedNgrams:
    """See `hashed_encoder`."""

    source = "hashed n-grams of descriptions (not CLIP)"

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """`[texts, width]`, rows of length 1."""
        counts = [Counter(_ngrams(text)) for text in texts]
        documents = Counter(gram for count in counts for gram in count)
        table = torch.zeros(len(texts), self.width, dtype=torch.float64)
        for row, count in zip(table, counts):
            for gram, n in count.items():
                weight = (1 + math.log(n)) * (1 + math.log(len(texts) / documents[gram]))
                digest = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
                row[(digest >> 1) % self.width] += weight if digest & 1 else -weight
        return table / table.norm(dim=1, keepdim=True)


def hashed_encoder(width: int = 512) -> HashedNgrams:
    """Words and their character 3- to 5-grams, weighted by tf-idf, hashed with signs into `width` columns.

    Needs no model and no download, and is the same everywhere. It is no CLIP: two texts are alike as far as they share
    words and parts of words, and nothing in it has ever seen an image. Weights depend on all texts of a call. (Feature
    hashing: Weinberger et al., ICML 2009.)
    """
    return HashedNgrams(width)


def _ngrams(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return words + [f"<{word}>"[i : i + n] for word in words for n in (3, 4, 5) for i in range(len(word) + 3 - n)]


# ------------------------------------------------------------------------------------------------ other packages
def open_clip_encoder(name: str = "ViT-B-32", pretrained: str = "openai") -> Encoder:
    """The text tower of a CLIP from open_clip (`pip install open_clip_torch`), which may download it. E is 512 here."""
    open_clip = _package("open_clip", "open_clip_torch")
    model, *_ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    tokens = open_clip.get_tokenizer(name)
    return _sourced(lambda texts: model.eval().encode_text(tokens(texts)), f"open_clip {name} {pretrained}")


def clip_encoder(name: str = "ViT-B/32") -> Encoder:
    """The text tower of OpenAI's `clip` package, which may download it. E is 512 here."""
    clip = _package("clip", "git+https://github.com/openai/CLIP.git")
    model, _ = clip.load(name, device="cpu")
    return _sourced(lambda texts: model.encode_text(clip.tokenize(texts, truncate=True)), f"clip {name}")


def sentence_encoder(name: str = "all-MiniLM-L6-v2") -> Encoder:
    """A model of sentence-transformers, which may download it. E is 384 here. It knows text, no images."""
    package = _package("sentence_transformers", "sentence-transformers")
    model = package.SentenceTransformer(name)
    return _sourced(lambda texts: model.encode(texts, convert_to_tensor=True), f"sentence-transformers {name}")


def _sourced(encode: Encoder, source: str) -> Encoder:
    def encoder(texts: list[str]) -> torch.Tensor:
        return encode(texts)

    encoder.source = source  # type: ignore[attr-defined]
    return encoder


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Text features of {name} need the package: pip install {install}. Without it: load_text_features of a "
            "file, hashed_encoder, or random_text_features as a control."
        ) from error
