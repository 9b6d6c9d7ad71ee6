"""One or a few steps of the selective scan on a state kept in place: what the operator means."""

from __future__ import annotations

import torch


def selective_state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rom.ops.selective_state_update`."""
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    steps = u.shape[1] if u.dim() == 3 else 1
    batch, dim = u.shape[0], u.shape[-1]
    x, dt = (t.to(compute).reshape(batch, steps, dim) for t in (u, delta))
    if delta_bias is not None:
        dt = dt + delta_bias.to(compute)
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    by_channel = [per_channel(t.to(compute), batch, steps, dim, u.dim()) for t in (B, C)]
    slots = torch.arange(batch, device=u.device) if state_indices is None else state_indices.long()
    used = (slots >= 0).nonzero().squeeze(1)
    h, ys = state[slots[used]].to(compute), []
    for t in range(steps):
        dtx, b, c = dt[used, t, :, None], by_channel[0][used, t], by_channel[1][used, t]
        h = torch.exp(dtx * A.to(compute)) * h + dtx * b * x[used, t, :, None]
        ys.append((h * c).sum(-1))
    y = torch.stack(ys, 1) if steps else x[used]
    if D is not None:
        y = y + D.to(compute) * x[used]
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(compute).reshape(batch, steps, dim)[used])
    state[slots[used]] = h.to(state.dtype)
    out = torch.zeros(batch, steps, dim, dtype=u.dtype, device=u.device)
    out[used] = y.to(u.dtype)
    return out.view(u.shape)


def per_channel(coefficients: torch.Tensor, batch: int, steps: int, dim: int, rank: int) -> torch.Tensor:
    """B or C in any of its forms as `[batch, steps, dim, state]`; `rank` is that of u."""
    grouped = by_group(coefficients, batch, steps, dim, rank)
    return grouped.repeat_interleave(dim // grouped.shape[2], dim=2)


def by_group(coefficients: torch.Tensor, batch: int, steps: int, dim: int, rank: int) -> torch.Tensor:
    """B or C as `[batch, steps, groups, state]`, a view. Constant over time, it is one group per channel."""
    state = coefficients.shape[-1]
    if coefficients.dim() == 2 and (rank == 3 or coefficients.shape[0] != batch):
        return coefficients[None, None].expand(batch, steps, dim, state)
    groups = coefficients.shape[-2] if coefficients.dim() == rank + 1 else 1
    return coefficients.view(batch, steps, groups, state)
