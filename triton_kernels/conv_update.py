"""The decode step of the causal convolution, in place on its state (rom_conv_update of csrc/include/rom/conv.h)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .conv import compute_type, sigmoid, wide


@triton.jit
def update_kernel(
    x, conv_state, weight, bias, state_indices, out,
    steps, dim, x_batch, x_step, state_slot, state_channel, state_place, out_batch, out_step,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK channels of one sequence; the window is a (BLOCK, PLACES) tile, PLACES >= WIDTH.

    The window of step t is the state from place t + 1 on, and behind its end the inputs 0 … t: it is read anew for
    every step (from the cache), and the last one is the new state.
    """
    blocks = tl.cdiv(dim, BLOCK)
    program = tl.program_id(0)
    c, batch = program % blocks * BLOCK + tl.arange(0, BLOCK), program // blocks
    k = tl.arange(0, PLACES)
    slot = wide(batch)
    if state_indices is not None:
        slot = wide(tl.load(state_indices + batch))
    live = slot >= 0
    x += wide(batch) * x_batch
    out += wide(batch) * out_batch
    column = conv_state + slot * state_slot + c[:, None] * state_channel
    channel = c < dim
    inside = channel[:, None] & (k < WIDTH)[None, :]
    taps = tl.load(weight + c[:, None] * WIDTH + k[None, :], mask=inside, other=0.0).to(COMPUTE)
    window = tl.zeros_like(taps)
    for t in range(steps):
        place = (k + t + 1)[None, :]
        old = tl.load(column + place * state_place, mask=inside & live & (place < WIDTH), other=0.0).to(COMPUTE)
        step = x + wide(place - WIDTH) * x_step + c[:, None]
        window = old + tl.load(step, mask=inside & live & (place >= WIDTH), other=0.0).to(COMPUTE)
        y = tl.sum(taps * window, 1)
        if bias is not None:
            y += tl.load(bias + c, mask=channel, other=0.0).to(COMPUTE)
        if SILU:
            y *= sigmoid(y)
        y = tl.where(live, y, 0.0)
        tl.store(out + wide(t) * out_step + c, y.to(out.dtype.element_ty), mask=channel)
    tl.debug_barrier()  # a place may be read by one thread and written by another
    tl.store(column + k[None, :] * state_place, window.to(conv_state.dtype.element_ty), mask=inside & live)


def conv_update(
    silu: int,
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """rom_conv_update of csrc/include/rom/conv.h."""
    batch, steps, dim = x.shape
    width = weight.shape[1]
    block = 128  # a thread per channel: one sequence of 8192 channels occupies 64 SMs
    if x.numel() > 0:
        update_kernel[(batch * triton.cdiv(dim, block),)](
            x, conv_state, weight, bias, state_indices, out,
            steps, dim, *x.stride()[:2], *conv_state.stride(), *out.stride()[:2],
            SILU=bool(silu), WIDTH=width, PLACES=triton.next_power_of_2(width),
            BLOCK=block, COMPUTE=compute_type(x.dtype), num_warps=4,
        )  # fmt: skip
