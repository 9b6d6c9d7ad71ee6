"""selective_state_update, the scan's decode step: one program per sequence and block of channels.

The states of a block are read once, taken through the steps in registers and written back: the state's own traffic is
the floor. B and C are read per channel, since the group may change within a block; they stay in the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .scan import LANES, LOG2E, PER_WARP, load_or, sigmoid, softplus


@triton.jit
def update_kernel(
    state, u, delta, A, B, C, D, z, delta_bias, state_indices, out,
    slots, steps, dim, blocks, B_per_group, C_per_group, state_slot, state_channel,
    u_batch, u_time, delta_batch, delta_time, B_batch, B_time, B_group, C_batch, C_time, C_group, z_batch, z_time,
    SOFTPLUS: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`steps` steps of one sequence and block; a negative slot is padding: out is 0, no state changes.

    A slot that does not exist cannot be refused here: out is NaN, and no state changes either.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    slot = b if state_indices is None else tl.load(state_indices + b).to(tl.int64)
    inside = (d < dim) & (slot >= 0) & (slot < slots)
    here = inside[:, None] & (n < STATE)[None, :]
    none = tl.zeros([BLOCK], COMPUTE)
    a_log = tl.load(A + d[:, None] * STATE + n[None, :], mask=here, other=0.0) * LOG2E
    skip, bias = load_or(D, d, inside, none), load_or(delta_bias, d, inside, none)
    kept = state + slot * state_slot + d[:, None].to(tl.int64) * state_channel + n[None, :]
    B_at = B + b * B_batch + (d // B_per_group)[:, None] * B_group + n[None, :]
    C_at = C + b * C_batch + (d // C_per_group)[:, None] * C_group + n[None, :]
    h = tl.load(kept, mask=here, other=0.0)
    for t in range(0, steps):
        u_t = tl.load(u + b * u_batch + t * u_time + d, mask=inside, other=0.0).to(COMPUTE)
        delta_t = tl.load(delta + b * delta_batch + t * delta_time + d, mask=inside, other=0.0).to(COMPUTE) + bias
        if SOFTPLUS:
            delta_t = softplus(delta_t)
        B_t = tl.load(B_at + t * B_time, mask=here, other=0.0).to(COMPUTE)
        C_t = tl.load(C_at + t * C_time, mask=here, other=0.0).to(COMPUTE)
        h = tl.exp2(a_log * delta_t[:, None]) * h + (delta_t * u_t)[:, None] * B_t
        y = tl.sum(h * C_t, 1) + skip * u_t
        if z is not None:
            z_t = tl.load(z + b * z_batch + t * z_time + d, mask=inside, other=0.0).to(COMPUTE)
            y *= z_t * sigmoid(z_t)
        y = tl.where(slot < slots, y, float("nan"))
        tl.store(out + (b * steps + t) * dim + d, y.to(out.dtype.element_ty), mask=d < dim)
    tl.store(kept, h, mask=here)


def state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: int,
    state_indices: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """rom_state_update of csrc/include/rom/state_update.h; out is contiguous."""
    (batch, steps, dim), count = u.shape, A.shape[1]
    states = triton.next_power_of_2(count)
    block = min(max(PER_WARP // states, 8), LANES, triton.next_power_of_2(max(dim, 1)))
    blocks = triton.cdiv(dim, block)
    if batch * blocks == 0:
        return
    strides = {}
    for name, x in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C)):
        strides |= {f"{name}_batch": 0, f"{name}_time": 0} if x is None else _strides(name, x)
    update_kernel[(batch * blocks,)](
        state, u, delta, A, B, C, D, z, delta_bias, state_indices, out,
        slots=state.shape[0], steps=steps, dim=dim, blocks=blocks,
        B_per_group=dim // B.shape[2], C_per_group=dim // C.shape[2],
        state_slot=state.stride(0), state_channel=state.stride(1), **strides,
        SOFTPLUS=bool(delta_softplus), STATE=count, STATES=states, BLOCK=block,
        COMPUTE=tl.float64 if state.dtype == torch.float64 else tl.float32,
        num_warps=min(max(block * states // PER_WARP, 1), 8),
    )  # fmt: skip


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    by_group = {f"{name}_group": x.stride(2)} if x.dim() == 4 else {}
    return {f"{name}_batch": x.stride(0), f"{name}_time": x.stride(1)} | by_group
