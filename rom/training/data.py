"""Text as bytes: reading it, splitting it, and drawing batches as a pure function of the step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from rom.training.errors import CorpusError

VOCABULARY = 256  # every byte is a token: no tokenizer to train, and every text can be read and written
UndecodableText = Literal["strict", "skip", "keep"]


@dataclass(frozen=True)
class Corpus:
    """Bytes of one or several texts, one after the other.

    Attributes:
        tokens: `[N]` uint8.
        name: what to call it in a log.
        files: texts in it.
        skipped: files left out because they are not UTF-8 (`errors="skip"`).
    """

    tokens: np.ndarray
    name: str
    files: int
    skipped: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        """Identifies the bytes: a resumed run must go on with the text it started with."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]

    def split(self, validation: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
        """The first 1 − `validation` of the bytes to train on, the rest, contiguous as well, to validate on."""
        boundary = len(self.tokens) - int(len(self.tokens) * validation)
        return self.tokens[:boundary], self.tokens[boundary:]


def python_reference() -> Corpus:
    """The language reference that ships inside Python (`pydoc_data.topics`, what `help("for")` prints), about 0.7 MB.

    Every Python has it, so a first run needs no download; its text differs a little between Python versions.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 - 0.7 MB that only this corpus needs

    text = "".join(topics[key] for key in sorted(topics))
    return Corpus(np.frombuffer(text.encode(), dtype=np.uint8), "Python's language reference", len(topics))


def read_corpus(paths: Sequence[str | os.PathLike[str]], errors: UndecodableText = "strict") -> Corpus:
    """Reads text files and, recursively, folders, in sorted order; hidden files inside folders are left out.

    Args:
        paths: files and folders.
        errors: what to do with a file that is not UTF-8: "strict" raises, "skip" leaves the file out, "keep" takes
            its bytes as they are.

    Raises:
        CorpusError: a path is missing or cannot be read, a file is not UTF-8 (names the file and the byte), or there is
            no text at all.
    """
    parts, skipped = [], []
    for file in (file for path in paths for file in _files(Path(path))):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CorpusError(f"cannot read {file}: {error.strerror}.") from error
        if errors != "keep" and (offset := _undecodable(content)) is not None:
            if errors == "strict":
                raise CorpusError(
                    f"{file} is not UTF-8 text: byte {offset} (0x{content[offset]:02x}) cannot be decoded. Convert it, "
                    "leave such files out with --errors skip, or train on the bytes as they are with --errors keep."
                )
            skipped.append(file)
            continue
        parts.append(content)
    tokens = np.frombuffer(b"".join(parts), dtype=np.uint8)
    name = ", ".join(str(path) for path in paths)
    if not len(tokens):
        left_out = f" ({len(skipped)} files that are not UTF-8 were left out)" if skipped else ""
        raise CorpusError(f"no text in {name}{left_out}. Give files or folders that hold some.")
    return Corpus(tokens, name, len(parts), tuple(skipped))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from _files_below(path)
    elif path.exists():
        raise CorpusError(f"{path} is neither a regular file nor a folder.")
    else:
        raise CorpusError(f"{path} does not exist.")


def _files_below(folder: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise CorpusError(f"cannot read {error.filename}: {error.strerror}.") from error

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(root, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _undecodable(content: bytes) -> int | None:
    """The offset of the first byte that is not UTF-8, or None."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def require_length(train: np.ndarray, validation: np.ndarray, sequence_length: int) -> None:
    """Raises CorpusError when a training sequence, or anything to validate on, does not fit into the splits."""
    if len(train) < sequence_length or len(validation) < 2:
        total = len(train) + len(validation)
        raise CorpusError(
            f"the text is too short: {total} bytes, of which {len(train)} are for training, and a sequence needs "
            f"{sequence_length}. Give more text or a shorter --sequence-length."
        )


class Batches(Protocol):
    """A source of training batches. The step is the whole position: resuming at step s is asking for batch s."""

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step, `[batch, length]` int64; the same step always gives the same batch."""


class WindowBatches:
    """Batches of windows of one long token array, which may be a memory map.

    An epoch cuts the array into windows at a random offset and visits each once, in random order; offset and order
    depend on the seed and the epoch only. Neighbouring windows share one token, the last target of one and the first
    input of the other, so that every token is a target. Batches run on across the ends of epochs.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, sequence_length: int, seed: int = 0) -> None:
        self.tokens, self.batch_size, self.sequence_length, self.seed = tokens, batch_size, sequence_length, seed
        self._stride = sequence_length - 1
        # One window fewer than fit leaves a whole window of freedom to the offset.
        self.windows = max(1, (len(tokens) - 1) // self._stride - 1)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> torch.Tensor:
        """`[batch_size, sequence_length]` int64."""
        first = step * self.batch_size
        starts = [self._start(sample) for sample in range(first, first + self.batch_size)]
        rows = np.stack([self.tokens[start : start + self.sequence_length] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))

    def _start(self, sample: int) -> int:
        epoch, index = divmod(sample, self.windows)
        if epoch != self._epoch:
            random = np.random.default_rng((self.seed, epoch))
            offset = random.integers(len(self.tokens) - self.windows * self._stride)
            self._epoch = epoch
            self._starts = offset + self._stride * random.permutation(self.windows)
        return int(self._starts[index])


def scored_windows(length: int, window: int, stride: int) -> Iterable[tuple[int, int, int]]:
    """Windows that score every token but the first exactly once, each with as much context as its window holds.

    Yields `(start, stop, scored)`: the model reads tokens start..stop-1 and its predictions of the last `scored` of
    them count. The windows advance by `stride`, so all but the first window's tokens have ≥ window − stride context.
    """
    done = 1
    start = 0
    while done < length:
        stop = min(start + window, length)
        yield start, stop, stop - done
        done = stop
        start += stride
