"""Files that are never seen half written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A file to write in place of `path`: a reader, or a crash at any moment, finds the old one or the whole new one.

    The new file is on the disk when this returns. With `previous`, the old one stays under that name; killed between
    the two renames, only `previous` is there. OSError (disk full, no permission): what was there stays.

    >>> with rom.files.replacing(Path(folder) / "notes.txt") as partial:
    ...     _ = partial.write_text("done")
    """
    partial = path.with_name(f"{path.name}.partial")  # one name: what a killed process left is written over
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)  # as the umask says; safetensors would leave 0600
        yield partial
        os.chmod(partial, mode)
        flush(partial)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Returns when the file (or the folder's list of names) is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
