"""Averaging what the clients send, coordinate by coordinate over those who hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """A client's answer: its model after local training, and the number of examples it trained on."""

    client: int
    group: str
    examples: int
    state: State


def refusal(update: Update, expected: State) -> str:
    """Why an update cannot be used; empty if it can."""
    if update.examples <= 0:
        return f"{update.examples} examples"
    if missing := sorted(set(expected) ^ set(update.state)):
        return f"missing or unknown tensors: {', '.join(missing[:3])}"
    for name, tensor in update.state.items():
        if tensor.shape != expected[name].shape:
            return f"{name} of shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or infinity"
    return ""


def leading(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The leading slice of that shape: what a narrower model holds of a wider one's tensor."""
    return tensor[tuple(slice(0, size) for size in shape)]


def average(updates: Sequence[Update], before: State) -> dict[str, torch.Tensor]:
    """The mean over clients weighted by examples, for every coordinate over the clients that hold it (HeteroFL).

    `before` has the shapes of the widest model; a coordinate nobody holds keeps its value from there. With equal
    widths this is FedAvg. Sums are float64 in the order of the clients, so the result does not depend on who answered
    first.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    result = {}
    for name, old in before.items():
        total, weight = torch.zeros_like(old, dtype=torch.float64), torch.zeros_like(old, dtype=torch.float64)
        for update in ordered:
            tensor = update.state[name]
            leading(total, tensor.shape).add_(tensor.double(), alpha=update.examples)
            leading(weight, tensor.shape).add_(update.examples)
        mean = (total / weight).to(old.dtype)
        result[name] = torch.where(weight > 0, mean, old)
    return result
