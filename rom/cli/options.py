"""Types and choices that several subcommands share."""

from __future__ import annotations

import argparse
import math

from rom.training.errors import TrainingError


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def select_device(name: str | None) -> str:
    """The device asked for, or a GPU if there is one; TrainingError when it cannot be used."""
    import torch  # noqa: PLC0415 - help must not wait for it

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        raise TrainingError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return name
