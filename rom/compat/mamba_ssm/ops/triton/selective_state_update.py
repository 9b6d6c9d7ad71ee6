"""`selective_state_update` with the original's arguments."""

from __future__ import annotations

from typing import Any

import torch

from rom import ops


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rom.ops.selective_state_update`; the state is overwritten.

    Args:
        state: `[batch, dim, state]`, or `[batch, heads, dim, state]` with a heads axis in all that follows
            (`[slots, …]` with state_batch_indices). Any floating dtype: computed in float32.
        x, dt, z: `[batch, dim]`. A: `[dim, state]`. D, dt_bias: `[dim]`.
        B, C: `[batch, state]` or `[batch, groups, state]`; the same with heads.
        state_batch_indices: `[batch]` integers.

    Returns:
        like x.
    """
    heads = state.dim() == 4

    def flat(tensor: torch.Tensor | None, first: int = 1, like: torch.Tensor | None = None) -> Any:
        """Heads and dim as one dimension."""
        if tensor is None:
            return None
        tensor = tensor.flatten(first, first + 1) if heads else tensor
        return tensor if like is None else tensor.to(like.dtype)

    kept = flat(state)
    # In place where the state is float32 and heads need no copy, else written back.
    own = kept if kept.dtype in (torch.float32, torch.float64) and kept.stride(-1) == 1 else kept.float().contiguous()
    indices = None if state_batch_indices is None else state_batch_indices.to(torch.int32)
    with torch.no_grad():
        vectors = flat(x), flat(dt, like=x), flat(A, 0).float(), B, C, flat(D, 0), flat(z, like=x), flat(dt_bias, 0)
        out = ops.selective_state_update(own, *vectors, dt_softplus, indices)
        if own.data_ptr() != state.data_ptr():
            state.copy_(own.view(state.shape))
    return out.view(x.shape)


selective_state_update_ref = selective_state_update
