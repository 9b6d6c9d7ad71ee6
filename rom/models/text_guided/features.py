"""Tables of text embeddings, one row per class: released files, seeded random tables, and rows in the wrong order."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rom import files


class TextFeatures(NamedTuple):
    """`table` [C, E] float32, rows of any length, and `source`: in words, where it comes from."""

    table: torch.Tensor
    source: str


def as_text_features(found: TextFeatures | torch.Tensor) -> TextFeatures:
    """A checked table, the mean over the descriptions of `[C, D, E]`; ValueError for one that cannot be a head."""
    table, source = found if isinstance(found, TextFeatures) else (found, "a tensor")
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"text features: expected a tensor or TextFeatures, got {type(table).__name__}.")
    if table.dim() not in (2, 3) or 0 in table.shape or not table.is_floating_point():
        raise ValueError(
            f"text features: expected floating [classes, width] or [classes, descriptions, width], got {table.dtype} "
            f"{list(table.shape)}."
        )
    table = table.detach().float()
    table = table.mean(1) if table.dim() == 3 else table
    lengths = table.norm(dim=1)
    usable = torch.isfinite(lengths) & (lengths > 0)
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        raise ValueError(
            f"text features: expected finite rows that are not zero, got length {lengths[row]} in row {row}."
        )
    return TextFeatures(table, source)


def load_text_features(path: str | Path, classes: int | None = None, width: int | None = None) -> TextFeatures:
    """The text features of a released file (`gpt3.pth` is 1000 × 512): one tensor, saved by torch.

    classes, width: what it has to be. The file is read without executing anything in it. Raises FileNotFoundError, and
    ValueError for a file that is damaged, holds something else, or has another shape.

    >>> from rom.models import text_guided
    >>> path = Path(folder) / "features.pth"
    >>> text_guided.save_text_features(path, text_guided.random_text_features(3, 8))
    >>> text_guided.load_text_features(path, classes=3).table.shape
    torch.Size([3, 8])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text features: {path} does not exist.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and tensors each have their own for a truncated or foreign file
        raise ValueError(f"text features: {path} is damaged, truncated or no file of a tensor: {error}") from error
    if not isinstance(content, torch.Tensor):
        got = f"a dictionary of {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, dict) else content
        raise ValueError(f"text features: expected one tensor [classes, width] in {path}, got {str(got)[:200]}.")
    found = as_text_features(TextFeatures(content, f"file {path.name}"))
    for name, expected, size in zip(("classes", "width"), (classes, width), found.table.shape):
        if expected not in (None, size):
            raise ValueError(
                f"text features: expected {expected} {name}, got {size} in {path} of shape {list(found.table.shape)}."
            )
    return found


def save_text_features(path: str | Path, found: TextFeatures | torch.Tensor) -> None:
    """Writes the table as the released files are; whole or not at all."""
    with files.replacing(Path(path)) as partial:
        torch.save(as_text_features(found).table, partial)


def random_text_features(classes: int, width: int = 512, seed: int = 0) -> TextFeatures:
    """Random rows of length 1: the control that knows nothing of the classes.

    Up to `width` classes, rows are orthonormal; beyond, no more than `width` can be, and the columns are orthogonal
    instead. Drawn uniformly (QR of a float64 Gaussian, signs fixed).
    """
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(classes, width), min(classes, width), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    rows = q if classes > width else q.mT
    table = (rows / rows.norm(dim=1, keepdim=True)).float().contiguous()
    return TextFeatures(table, f"no text: random orthonormal, seed {seed}")


def shuffled(found: TextFeatures, seed: int = 0) -> TextFeatures:
    """The same rows, none at its own class: the control that tells text from a table with text's geometry."""
    order = list(range(len(found.table)))
    draw = np.random.default_rng(seed)
    for i in range(len(order) - 1, 0, -1):  # Sattolo's algorithm: a single cycle, so nothing stays
        j = int(draw.integers(i))
        order[i], order[j] = order[j], order[i]
    return TextFeatures(found.table[order], f"{found.source}, shuffled with seed {seed}")
