"""Routing and routed projections in plain torch: what the operators mean."""

from __future__ import annotations

from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


def route(logits: torch.Tensor, top_k: int, normalize: bool = False, routed_scale: float = 1.0) -> Tensors:
    """See `rom.ops.route`; the fields of `rom.Routing` in order."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens, experts = logits.shape
    scores = logits.to(compute)
    probs = scores.softmax(-1)
    # A stable sort gives ties to the lower index; on the logits, for softmax maps neighbouring ones to one float.
    chosen = scores.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights = probs.gather(-1, chosen)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    slots = chosen.flatten()
    perm = slots.argsort(stable=True)
    inv = torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=perm.device))
    counts = torch.zeros(experts, dtype=torch.int64, device=slots.device).scatter_add_(0, slots, torch.ones_like(slots))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    integers = (t.to(torch.int32) for t in (chosen, counts, offsets, perm, inv.view(tokens, top_k)))
    indices, counts, offsets, perm, inv = integers
    return indices, weights * routed_scale, counts, offsets, perm, inv, probs


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Any,
    bias: torch.Tensor | None = None,
    weighted: bool = False,
    rows_in: str = "token",
    rows_out: str = "token",
) -> torch.Tensor:
    """See `rom.ops.routed_linear`. Every expert computes every row and a mask keeps its own: E times the work, but no
    host synchronisation, any device, and derivatives of any order."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    perm, (tokens, top_k) = routing.perm.long(), routing.indices.shape
    rows = x.to(compute)
    if rows_in == "token":
        rows = rows[perm // top_k]
    expert = routing.indices.flatten()[perm]
    out = rows.new_zeros(len(perm), weight.shape[1])
    for i, w in enumerate(weight.to(compute).unbind(0)):
        part = rows @ w.mT if bias is None else rows @ w.mT + bias[i].to(compute)
        out = torch.where((expert == i)[:, None], part, out)
    if weighted:
        out = out * routing.weights.to(compute).flatten()[perm, None]
    if rows_out == "token":
        out = out[routing.inv.flatten().long()].unflatten(0, (tokens, top_k)).sum(1)
    return out.to(x.dtype)
