"""`causal_conv1d_fn` and `causal_conv1d_update` with the original's arguments: tensors are (batch, dim, length).

Our operators want channels last. A tensor that is a transposed view of such memory is read in place; others are copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rom import ops


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rom.ops.causal_conv1d` for x `[batch, dim, length]`.

    Args:
        x: `[batch, dim, length]`. weight: `[dim, width]`. bias: `[dim]`.
        seq_idx: `[batch, length]` integers: which sequence of its row a step belongs to, constant over each sequence; a
            step sees its own only. The result is 0 where it is negative.
        initial_states: `[batch, dim, width - 1]`, the inputs before; not with seq_idx.
        return_final_states: also returns the last width - 1 inputs, `[batch, dim, width - 1]`, in x's dtype.
        final_states_out: the place for them.
        activation: None, "silu" or "swish".

    Returns:
        `[batch, dim, length]`, or `(out, final_states)`.

    Raises:
        ValueError: seq_idx with states, or shapes that do not fit.
    """
    keeps = return_final_states or final_states_out is not None
    rows = x.transpose(1, 2)
    if seq_idx is not None:
        if initial_states is not None or keeps:
            raise ValueError("causal_conv1d_fn: expected seq_idx without initial and final states, got both.")
        return _by_sequence(rows, weight, bias, seq_idx, activation).transpose(1, 2)
    before = None if initial_states is None else F.pad(initial_states, (1, 0))  # ours holds one input more
    out = ops.causal_conv1d(rows, weight, bias, activation, before, return_final_state=keeps)
    if not keeps:
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)
    out, final = out
    final = final[:, :, 1:].to(x.dtype)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    out = out.transpose(1, 2)
    return (out, final) if return_final_states else out


def _by_sequence(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor, activation: str | None
) -> torch.Tensor:
    """All rows of the batch as one packed row, cut where seq_idx changes."""
    batch, length, dim = rows.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"causal_conv1d_fn: expected seq_idx of shape {(batch, length)}, got {tuple(seq_idx.shape)}.")
    new = torch.ones(batch, length, dtype=torch.bool, device=rows.device)
    new[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = new.flatten().nonzero()[:, 0].to(torch.int32)
    cu_seqlens = torch.cat([starts, starts.new_full((1,), batch * length)])
    packed = rows.reshape(1, batch * length, dim)
    out = ops.causal_conv1d(packed, weight, bias, activation, cu_seqlens=cu_seqlens)
    assert isinstance(out, torch.Tensor)
    return torch.where((seq_idx < 0)[..., None], 0.0, out.view(batch, length, dim))


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rom.ops.causal_conv1d_update` for x `[batch, dim]` or `[batch, dim, steps]`; conv_state is overwritten.

    Args:
        x: the next inputs.
        conv_state: `[batch, dim, places]` with places >= width - 1, newest last; `[slots, dim, places]` with
            conv_state_indices.
        weight: `[dim, width]`. bias: `[dim]`. activation: None, "silu" or "swish".
        cache_seqlens: `[batch]` int32: conv_state is a ring buffer and this many inputs came before.
        conv_state_indices: `[batch]` int32, the slot of each sequence; negative is padding.

    Returns:
        like x.
    """
    width, places = weight.shape[1], conv_state.shape[2]
    steps = x if x.dim() == 2 else x.transpose(1, 2)
    if places == width and cache_seqlens is None and conv_state.dtype in (x.dtype, torch.float32):
        indices = None if conv_state_indices is None else conv_state_indices.to(torch.int32)
        out = ops.causal_conv1d_update(steps, conv_state, weight, bias, activation, indices)
        return out if x.dim() == 2 else out.transpose(1, 2)
    return _any_state(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


@torch.no_grad()
def _any_state(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
) -> torch.Tensor:
    """States of another size, and ring buffers: gathered, convolved with their past in front, and written back."""
    width, places = weight.shape[1], conv_state.shape[2]
    if places < width - 1:
        raise ValueError(f"causal_conv1d_update: expected a conv_state of at least {width - 1} places, got {places}.")
    new = x.unsqueeze(-1) if x.dim() == 2 else x
    steps, device = new.shape[-1], x.device
    slots = torch.arange(len(x), device=device) if conv_state_indices is None else conv_state_indices.long()
    real = slots >= 0
    state = conv_state[slots.clamp_min(0)]
    offsets = torch.arange(-places, steps, device=device)
    if cache_seqlens is None:
        past = state
    else:  # the input of step t lies at t mod places
        ring = (cache_seqlens.long()[:, None] + offsets[:places]) % places
        past = state.gather(2, ring[:, None].expand_as(state))
    row = torch.cat([past.to(new.dtype), new], -1)
    before = F.pad(row[..., places - (width - 1) : places], (1, 0))
    out = ops.causal_conv1d(new.transpose(1, 2), weight, bias, activation, before)
    assert isinstance(out, torch.Tensor)
    out = torch.where(real[:, None, None], out.transpose(1, 2), 0.0)
    kept = row[..., -places:]
    if cache_seqlens is not None:
        ring = (cache_seqlens.long()[:, None] + steps + offsets[:places]) % places
        kept = torch.empty_like(kept).scatter_(2, ring[:, None].expand_as(kept), kept)
    conv_state[slots[real]] = kept[real].to(conv_state.dtype)
    return out.squeeze(-1) if x.dim() == 2 else out
