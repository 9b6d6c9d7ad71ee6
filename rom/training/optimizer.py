"""AdamW with weight-decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: weight decay for matrices, none for the rest.

    The rest is everything marked `_no_weight_decay` (A_log and D of a Mamba block: decaying A_log pulls every decay
    rate towards −1), biases (also those with an expert axis) and vectors such as norm weights. Embeddings are matrices
    and decay. A parameter used twice (tied embeddings) is in a group once; frozen ones are in none.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keep = getattr(parameter, "_no_weight_decay", False) or parameter.dim() < 2 or name.endswith("bias")
        (free if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`, in one fused pass over all parameters."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def warmup_cosine(progress: float, warmup: float, final: float) -> float:
    """The factor on the learning rate: linear up to 1 over the first `warmup`, then half a cosine down to `final`.

    Args:
        progress: how much of the run is done, 0 to 1.
        warmup: the part of the run that warms up, 0 to 1.
        final: the factor at the end.
    """
    if progress < warmup:
        return progress / warmup
    if warmup >= 1 or progress >= 1:
        return final if progress >= 1 else 1.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
