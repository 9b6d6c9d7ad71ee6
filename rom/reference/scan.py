"""The selective scan in plain torch: what the operator means. Complex A and double backward run here, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    out_dtype: torch.dtype | None = None,
    row_index: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `rom.ops.selective_scan`. With complex A (one of each conjugate pair), y = 2 Re Σ C h."""
    out_dtype, compute = out_dtype or u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    A = A.to(compute.to_complex() if A.is_complex() else compute)
    u, delta = u.to(compute), delta.to(compute) + (0 if delta_bias is None else delta_bias.to(compute))
    delta = softplus(delta) if delta_softplus else delta
    B, C = (_by_time(x.to(A.dtype), u) for x in (B, C))
    lengths = [u.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    h = A.new_zeros(u.shape[0] * len(lengths), *A.shape) if initial_state is None else initial_state.to(A.dtype)
    parts = (*(x.split(lengths, 1) for x in (u, delta, B, C)), h.split(max(u.shape[0], 1)))
    ys, states = zip(*map(_scan, [A] * len(lengths), *parts))
    y = torch.cat(ys, 1) if D is None else torch.cat(ys, 1) + D.to(compute) * u
    rows = None if row_index is None else row_index.flatten(0, -2).long()
    if z is not None:
        y = y * silu(z.to(compute) if rows is None else z.to(compute)[rows].sum(1).view_as(y))
    if rows is not None:
        each = y.reshape(rows.shape[0], 1, y.shape[-1]).expand(*rows.shape, y.shape[-1]).flatten(0, 1)
        y = torch.zeros_like(each).index_copy(0, rows.flatten(), each)
    return (y.to(out_dtype), torch.cat(states)) if return_final_state else y.to(out_dtype)


def _by_time(x: Tensor, u: Tensor) -> Tensor:
    """B or C in any of its layouts as (batch, length, dim or 1, state)."""
    by_time = x.expand(*u.shape[:2], *x.shape) if x.dim() == 2 else x.unsqueeze(2)
    return by_time if x.dim() < 4 else x.repeat_interleave(u.shape[2] // x.shape[2], 2)


def _scan(A: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences of one length. Autograd of unbind is linear in the length, that of x[:, t] quadratic."""
    ys = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u.unsqueeze(-1), delta.unsqueeze(-1), B, C))):
        h = torch.exp(delta_t * A) * h + delta_t * B_t * u_t
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, 1) if ys else u
    return 2 * y.real if y.is_complex() else y, h
