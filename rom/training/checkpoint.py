"""Checkpoints that survive being interrupted: one safetensors file, written aside and renamed into place.

A checkpoint holds the model's parameters and buffers, the optimiser's state, the random generators and a small
dictionary (step, best result so far, settings), with a checksum over all of it. The file before the last one stays as
`checkpoint.previous.safetensors`, so a damaged file costs the steps since then and no more.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rom import files
from rom.training.errors import CheckpointError

LAST, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"

Tensors = dict[str, torch.Tensor]


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes the checkpoint of a run; the one that was the last becomes the previous one.

    At no moment is there no complete checkpoint on the disk, whenever the process is killed.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); what was there stays.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in _named_state(model, optimizer).items()}
    text = json.dumps(state)
    last = folder / LAST
    try:
        with files.replacing(last, previous=folder / PREVIOUS) as partial:
            save_file(tensors, partial, {"state": text, "checksum": _checksum(tensors, text)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {last} ({error}). The checkpoint before it is untouched.") from error


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts what `load` read into the model, the optimiser and the random generators.

    Raises:
        CheckpointError: the tensors are those of another model.
    """
    wanted = _parameters_and_buffers(model)
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if {name: tuple(tensor.shape) for name, tensor in wanted.items()} != {
        name: tuple(tensor.shape) for name, tensor in found.items()
    }:
        raise CheckpointError(f"the checkpoint in {folder} is of another model: names or shapes of its tensors differ.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        slots = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if slots:  # `step` stays on the CPU or goes along, as the fused and the plain kernels each want it
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in slots.items()}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint, damaged or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def load(folder: Path, warn: Callable[[str], None]) -> tuple[Tensors, dict[str, Any]]:
    """Reads the last checkpoint, or the previous one when the last is damaged (and says so through `warn`).

    Raises:
        CheckpointError: there is none, or none is intact.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            tensors, state = _read(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warn(f"{problems[0]} Falling back to {path.name}, step {state.get('step')}.")
        return tensors, state
    if problems:
        raise CheckpointError(f"{' '.join(problems)} No intact checkpoint is left: start anew in another folder.")
    raise CheckpointError(f"there is no checkpoint in {folder}.")


def _read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({error}).") from error
    text = metadata.get("state", "")
    if metadata.get("checksum") != _checksum(tensors, text):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content.")
    return tensors, json.loads(text)


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    tensors = {f"model.{name}": tensor for name, tensor in _parameters_and_buffers(model).items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{slot}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _parameters_and_buffers(model: nn.Module) -> Tensors:
    """Each once: tied weights have one name here, and safetensors stores no tensor twice."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _checksum(tensors: Tensors, text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        content = tensors[name].cpu().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content.data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
