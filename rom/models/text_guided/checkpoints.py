"""Checkpoints of the released code, which is torchvision's reference script: keys, averages, what does not fit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

PREFIX = "module."  # of DistributedDataParallel and of AveragedModel


def read_checkpoint(path: str | Path, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a released checkpoint: its "model", or "model_ema" with `ema`, or the whole file.

    A `module.` prefix is taken off and the counter of the averages left out. The file is read without executing
    anything in it; the script's arguments (an argparse.Namespace) are the only object allowed beside tensors.

    Raises:
        FileNotFoundError. ValueError: the file is damaged, truncated, no checkpoint, or has no averages.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle and tensors each have their own for a truncated or foreign file
        raise ValueError(f"checkpoint {path} is damaged, truncated or no checkpoint: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path}: expected a state dict or a dictionary with one, got {type(content)}.")
    wanted = "model_ema" if ema else "model"
    if ema and wanted not in content:
        raise ValueError(f"checkpoint {path} has no {wanted!r}, only {', '.join(map(repr, content))}.")
    return _tensors(content.get(wanted, content), path)


def _tensors(state: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f'checkpoint {path}: expected tensors by name, or a dictionary with "model".')
    if state and all(name == "n_averaged" or name.startswith(PREFIX) for name in state):
        return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name != "n_averaged"}
    return dict(state)


def load_checkpoint(model: nn.Module, path: str | Path, ema: bool = False) -> None:
    """Puts a released checkpoint into a model; ValueError lists every name and shape that differs, and changes nothing.

    Arguments and errors are those of `read_checkpoint`.
    """
    load_state(model, read_checkpoint(path, ema), str(path))


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """`load_state_dict`, strict, with the whole difference in the error and nothing changed by it."""
    expected = model.state_dict()
    differences = [f"  {name}: missing in the file" for name in expected if name not in state]
    differences += [f"  {name}: unknown to the model" for name in state if name not in expected]
    differences += [
        f"  {name}: {list(tensor.shape)} in the file, {list(expected[name].shape)} in the model"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if differences:
        lines = "\n".join(differences)
        raise ValueError(f"checkpoint {origin} is of another model; {len(differences)} differences:\n{lines}")
    model.load_state_dict(state)
