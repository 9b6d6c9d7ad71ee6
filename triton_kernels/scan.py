"""Selective scan, forward and backward: one program per sequence and block of channels, sequential in time.

The states of a block are one [BLOCK, STATES] tile in registers. Triton lays it out as it would load it, four states per
thread and 8 × 4 lanes for 16 states, so a sum over states costs two shuffles, and softplus and SiLU are computed once
per channel. Backward runs each tile of TILE steps again from the checkpoint that the forward pass saved, keeps its
states in the workspace, and goes back through them (csrc/cpu/scan_backward.cpp has the formulas). Gradients of B and C
are sums over channels: one partial per block of channels; those of parameters are sums over time: one partial per
segment of sequences. `sum_kernel` adds partials in index order; nothing is atomic.

The host functions take what the native kernels of the same names take (csrc/include/rom/scan.h); outputs are
contiguous. Checkpoints are [slot][channel][state].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 32  # ROM_SCAN_TILE
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LANES = 32  # most channels of a block: one per lane
PER_WARP = 512  # states a warp holds: 16 per thread
MAX_PROGRAMS = 2048  # of the backward pass, twice what an H200 holds at once; each has room for a tile's states
FORWARD_STAGES, BACKWARD_STAGES = 4, 2  # rows are loaded 3 steps ahead, or 1 of twice as much work
SUM_BLOCK = 512


# ------------------------------------------------------------------------------------------------ pieces
@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + 2 atanh(e / (2 + e)) with e = exp(-|x|).

    Triton has no log1p of its own, and log(1 + e) has no digits left where e is small.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 7  # the next would be below 9^-7 / 15 = 1.4e-8 of the sum
    series = tl.zeros_like(x)
    for i in tl.static_range(TERMS):
        series = series * (s * s) + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp may overflow to infinity."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def block_of(block, group_dim, group_blocks, BLOCK: tl.constexpr, STATE: tl.constexpr, STATES: tl.constexpr):
    """(group, channels d, states n, their places in (dim, state), and which of d, n and places exist) of a block.

    No block spans two groups.
    """
    i, n = (block % group_blocks) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    group, inside, exists = block // group_blocks, i < group_dim, n < STATE
    d = group * group_dim + i
    return group, d, n, d[:, None] * STATE + n[None, :], inside, exists, inside[:, None] & exists[None, :]


@triton.jit
def sequence_of(s, cu_seqlens, length, TILE: tl.constexpr):
    """(batch entry, first step, steps, slot of the first checkpoint), as csrc/cpu/scan.hpp counts the slots."""
    if cu_seqlens is None:
        return s, s * 0, length, s * tl.cdiv(length, TILE)
    else:
        begin = tl.load(cu_seqlens + s)
        return s * 0, begin.to(tl.int64), tl.load(cu_seqlens + s + 1) - begin, begin // TILE + s


@triton.jit
def load_step(table, step, stride, d, mask, COMPUTE: tl.constexpr):
    """A step's row."""
    return tl.load(table + step * stride + d, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_rows(table, row_index, row, step, stride, d, inside, K: tl.constexpr, COMPUTE: tl.constexpr):
    """A step's row of z or grad_out, or the sum of the K rows that row_index names."""
    if row_index is None:
        return load_step(table, step, stride, d, inside, COMPUTE)
    else:
        total = tl.zeros(d.shape, COMPUTE)
        for k in tl.static_range(K):
            named = tl.load(row_index + (row + step) * K + k).to(tl.int64)
            total += load_step(table, named, stride, d, inside, COMPUTE)
        return total


@triton.jit
def store_rows(table, row_index, row, dim, value, d, inside, K: tl.constexpr):
    """The way back, to contiguous rows."""
    for k in tl.static_range(K):
        named = row
        if row_index is not None:
            named = tl.load(row_index + row * K + k).to(tl.int64)
        tl.store(table + named * dim + d, value.to(table.dtype.element_ty), mask=inside)


@triton.jit
def load_coefficient(table, tile, step, stride, n, exists, BY_TIME: tl.constexpr, COMPUTE: tl.constexpr):
    """A step's row of B or C as [1, STATES], or the `tile` that is constant over time."""
    if BY_TIME:
        return load_step(table, step, stride, n, exists, COMPUTE)[None, :]
    else:
        return tile


@triton.jit
def load_delta(delta, step, stride, bias, d, inside, SOFTPLUS: tl.constexpr, COMPUTE: tl.constexpr):
    """(delta after bias and softplus, softplus')."""
    x = load_step(delta, step, stride, d, inside, COMPUTE) + bias
    if SOFTPLUS:
        return softplus(x), sigmoid(x)
    else:
        return x, tl.full(d.shape, 1.0, COMPUTE)


@triton.jit
def load_or(table, at, mask, default):
    """Values of a tensor in the dtype of `default`, or that where it is absent."""
    if table is None:
        return default
    else:
        return tl.load(table + at, mask=mask, other=0.0).to(default.dtype)


@triton.jit
def load_parameters(
    A, B, C, D, delta_bias, d, inside, at, here, B_BY_TIME: tl.constexpr, C_BY_TIME: tl.constexpr, COMPUTE: tl.constexpr
):
    """A log2(e), B and C where they are constant over time, D and delta_bias; zeros for what is absent."""
    zeros, none = tl.zeros(at.shape, COMPUTE), tl.zeros(d.shape, COMPUTE)
    B_tile = load_or(None if B_BY_TIME else B, at, here, zeros)
    C_tile = load_or(None if C_BY_TIME else C, at, here, zeros)
    skip, bias = load_or(D, d, inside, none), load_or(delta_bias, d, inside, none)
    return load_or(A, at, here, zeros) * LOG2E, B_tile, C_tile, skip, bias


@triton.jit
def store_if(table, at, value, mask):
    """Values of a tensor that may be absent."""
    if table is not None:
        tl.store(table + at, value, mask=mask)


# ------------------------------------------------------------------------------------------------ forward
@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, row_index, out, final_state, checkpoints,
    length, dim, group_dim, group_blocks, blocks, slot_stride, channel_stride,
    u_batch, u_time, delta_batch, delta_time, B_batch, B_time, B_group, C_batch, C_time, C_group, z_batch, z_time,
    SOFTPLUS: tl.constexpr, K: tl.constexpr, B_BY_TIME: tl.constexpr, C_BY_TIME: tl.constexpr,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and final_state of one sequence and block; the states at every TILE steps where `checkpoints` is given."""
    s = (tl.program_id(0) // blocks).to(tl.int64)
    batch, begin, steps, slot = sequence_of(s, cu_seqlens, length, TILE)
    group, d, n, at, inside, exists, here = block_of(
        tl.program_id(0) % blocks, group_dim, group_blocks, BLOCK, STATE, STATES
    )
    a_log, B_tile, C_tile, skip, bias = load_parameters(
        A, B, C, D, delta_bias, d, inside, at, here, B_BY_TIME, C_BY_TIME, COMPUTE
    )
    h = load_or(initial_state, s * dim * STATE + at, here, tl.zeros_like(a_log))
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    row = batch * length  # of row_index and out, which are contiguous
    for t in tl.range(0, steps, num_stages=STAGES):
        if t % TILE == 0:
            kept = (slot + t // TILE) * slot_stride + d[:, None] * channel_stride + n[None, :]
            store_if(checkpoints, kept, h, here)
        step = begin + t
        u_t = load_step(u, step, u_time, d, inside, COMPUTE)
        delta_t, _ = load_delta(delta, step, delta_time, bias, d, inside, SOFTPLUS, COMPUTE)
        B_t = load_coefficient(B, B_tile, step, B_time, n, exists, B_BY_TIME, COMPUTE)
        C_t = load_coefficient(C, C_tile, step, C_time, n, exists, C_BY_TIME, COMPUTE)
        h = tl.exp2(a_log * delta_t[:, None]) * h + (delta_t * u_t)[:, None] * B_t
        y = tl.sum(h * C_t, 1) + skip * u_t
        if z is not None:
            z_t = load_rows(z + batch * z_batch, row_index, row, step, z_time, d, inside, K, COMPUTE)
            y *= z_t * sigmoid(z_t)
        store_rows(out, row_index, row + step, dim, y, d, inside, K)
    tl.store(final_state + s * dim * STATE + at, h, mask=here)


# ------------------------------------------------------------------------------------------------ backward
@triton.jit
def replay(
    h, a_log, u, delta, B, B_tile, bias, states, first, count, u_time, delta_time, B_time, d, inside, n, exists,
    SOFTPLUS: tl.constexpr, B_BY_TIME: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile again, from its checkpoint: the state after its last step; `states` keeps the one before each."""
    for t in tl.range(0, count, num_stages=STAGES):
        tl.store(states + t * (BLOCK * STATES), h)
        u_t = load_step(u, first + t, u_time, d, inside, COMPUTE)
        delta_t, _ = load_delta(delta, first + t, delta_time, bias, d, inside, SOFTPLUS, COMPUTE)
        B_t = load_coefficient(B, B_tile, first + t, B_time, n, exists, B_BY_TIME, COMPUTE)
        h = tl.exp2(a_log * delta_t[:, None]) * h + (delta_t * u_t)[:, None] * B_t
    return h


@triton.jit
def through_gate(
    grad, y, z, grad_z, row_index, row, step, stride, dim, d, inside, K: tl.constexpr, COMPUTE: tl.constexpr
):
    """The gradient before the gate; that of z is stored. silu' = sigmoid · (1 + z · (1 − sigmoid))."""
    if z is None:
        return grad
    else:
        z_t = load_rows(z, row_index, row, step, stride, d, inside, K, COMPUTE)
        sigma = sigmoid(z_t)
        silu = z_t * sigma
        store_rows(grad_z, row_index, row + step, dim, grad * y * (sigma + silu * (1.0 - sigma)), d, inside, K)
        return grad * silu


@triton.jit
def gather(total, partial, at, value, exists, BY_TIME: tl.constexpr):
    """Gradient of B or C: this step's sum over channels is stored as a partial, or without time the total grows."""
    if BY_TIME:
        tl.store(partial + at, tl.sum(value, 0), mask=exists)
        return total
    else:
        return total + value


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, row_index, checkpoints, grad_out, grad_final_state,
    grad_u, grad_delta, grad_z, grad_initial_state,
    partial_B, partial_C, lines_A, lines_D, lines_bias, states,
    length, dim, rows, group_dim, group_blocks, blocks, slot_stride, channel_stride, sequences, segments,
    u_batch, u_time, delta_batch, delta_time, B_batch, B_time, B_group, C_batch, C_time, C_group, z_batch, z_time,
    grad_out_batch, grad_out_time,
    SOFTPLUS: tl.constexpr, K: tl.constexpr, B_BY_TIME: tl.constexpr, C_BY_TIME: tl.constexpr,
    STATE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of sequences and one block: those of u, delta, z and the initial state, and partials.

    partial_B, partial_C: [block][step][state], or where they are constant over time [segment][channel][state].
    lines_A [segment][channel][state], lines_D and lines_bias [segment][channel]. states: room for those of a tile.
    """
    block, segment = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    group, d, n, at, inside, exists, here = block_of(block, group_dim, group_blocks, BLOCK, STATE, STATES)
    a_log, B_tile, C_tile, skip, bias = load_parameters(
        A, B, C, D, delta_bias, d, inside, at, here, B_BY_TIME, C_BY_TIME, COMPUTE
    )
    zeros, none = tl.zeros_like(a_log), tl.zeros_like(skip)
    grad_A, grad_D, grad_bias, grad_B, grad_C = zeros, none, none, zeros, zeros
    states += tl.program_id(0).to(tl.int64) * (TILE * BLOCK * STATES)
    mine = states + tl.arange(0, BLOCK)[:, None] * STATES + n[None, :]
    for s in range(segment * sequences // segments, (segment + 1) * sequences // segments):
        batch, begin, steps, slot = sequence_of(s, cu_seqlens, length, TILE)
        row = batch * length
        u_s, delta_s = u + batch * u_batch, delta + batch * delta_batch
        B_s, C_s = B + batch * B_batch + group * B_group, C + batch * C_batch + group * C_group
        carry = load_or(grad_final_state, s * dim * STATE + at, here, zeros)
        for back in range(0, tl.cdiv(steps, TILE)):
            tile = tl.cdiv(steps, TILE) - 1 - back
            first, count = begin + tile * TILE, tl.minimum(steps - tile * TILE, TILE)
            kept = (slot + tile) * slot_stride + d[:, None] * channel_stride + n[None, :]
            h = tl.load(checkpoints + kept, mask=here, other=0.0)
            h = replay(
                h, a_log, u_s, delta_s, B_s, B_tile, bias, mine, first, count, u_time, delta_time, B_time,
                d, inside, n, exists, SOFTPLUS, B_BY_TIME, BLOCK, STATES, COMPUTE, STAGES,
            )  # fmt: skip
            tl.debug_barrier()  # a thread reads back what it wrote, if Triton lays both out alike, as it does today
            for t in tl.range(count - 1, -1, -1, num_stages=STAGES):
                step = first + t
                before = tl.load(mine + t * (BLOCK * STATES))
                u_t = load_step(u_s, step, u_time, d, inside, COMPUTE)
                delta_t, slope = load_delta(delta_s, step, delta_time, bias, d, inside, SOFTPLUS, COMPUTE)
                B_t = load_coefficient(B_s, B_tile, step, B_time, n, exists, B_BY_TIME, COMPUTE)
                C_t = load_coefficient(C_s, C_tile, step, C_time, n, exists, C_BY_TIME, COMPUTE)
                dy = load_rows(
                    grad_out + batch * grad_out_batch, row_index, row, step, grad_out_time, d, inside, K, COMPUTE
                )
                y = tl.sum(h * C_t, 1) + skip * u_t
                dy = through_gate(
                    dy, y, None if z is None else z + batch * z_batch, grad_z, row_index, row, step, z_time, dim,
                    d, inside, K, COMPUTE,
                )  # fmt: skip
                g = dy[:, None] * C_t + carry
                carry = tl.exp2(a_log * delta_t[:, None]) * g
                w = carry * before
                through_B, through_A = tl.sum(g * B_t, 1), tl.sum(w * a_log, 1) * LN2
                ddelta = (through_A + u_t * through_B) * slope
                store_rows(grad_u, None, row + step, dim, delta_t * through_B + skip * dy, d, inside, 1)
                store_rows(grad_delta, None, row + step, dim, ddelta, d, inside, 1)
                at_partial = (block.to(tl.int64) * rows + row + step) * STATE + n
                grad_B = gather(grad_B, partial_B, at_partial, g * (delta_t * u_t)[:, None], exists, B_BY_TIME)
                grad_C = gather(grad_C, partial_C, at_partial, dy[:, None] * h, exists, C_BY_TIME)
                grad_A += w * delta_t[:, None]
                grad_D += dy * u_t
                grad_bias += ddelta
                h = before
            tl.debug_barrier()
        store_if(grad_initial_state, s * dim * STATE + at, carry, here)
    line = segment * dim
    tl.store(lines_A + line * STATE + at, grad_A, mask=here)
    store_if(None if B_BY_TIME else partial_B, line * STATE + at, grad_B, here)
    store_if(None if C_BY_TIME else partial_C, line * STATE + at, grad_C, here)
    store_if(lines_D, line + d, grad_D, inside)
    store_if(lines_bias, line + d, grad_bias, inside)


@triton.jit
def sum_kernel(partials, out, count, many, groups, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, group, state] = Σ_i partials[group · many + i, row, state] in order of i; count = rows · STATE."""
    group = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for k in range(0, many):
        total += tl.load(partials + (group * many + k) * count + i, mask=i < count, other=0.0)
    tl.store(out + (i // STATE * groups + group) * STATE + i % STATE, total.to(out.dtype.element_ty), mask=i < count)


# ------------------------------------------------------------------------------------------------ host
def _problem(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    row_index: torch.Tensor | None,
    delta_softplus: int,
    backward: bool = False,
) -> tuple[int, dict[str, object]]:
    """(blocks, the arguments forward and backward share)."""
    (_, length, dim), state = u.shape, A.shape[1]
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    group_dim, states = dim // groups, triton.next_power_of_2(state)
    block = min(max(PER_WARP // states, 8), LANES, triton.next_power_of_2(max(group_dim, 1)))
    group_blocks = triton.cdiv(group_dim, block)
    per_warp = PER_WARP // 2 if backward and states > 128 else PER_WARP  # else 255 registers per thread spill
    arguments = {
        "length": length,
        "dim": dim,
        "group_dim": group_dim,
        "group_blocks": group_blocks,
        "blocks": groups * group_blocks,
        "SOFTPLUS": bool(delta_softplus),
        "K": 1 if row_index is None else row_index.shape[1],
        "B_BY_TIME": B.dim() == 4,
        "C_BY_TIME": C.dim() == 4,
        "STATE": state,
        "STATES": states,
        "BLOCK": block,
        "COMPUTE": tl.float64 if u.dtype == torch.float64 else tl.float32,
        "TILE": TILE,
        "num_warps": max(block * states // per_warp, 1),
    }
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        arguments |= _strides(name, x, by_row=name == "z" and row_index is not None)
    for name, x in (("B", B), ("C", C)):
        grouped = x.dim() == 4 and x.shape[2] > 1
        batch, time = (x.stride(0), x.stride(1)) if x.dim() == 4 else (0, 0)
        arguments |= {f"{name}_batch": batch, f"{name}_time": time, f"{name}_group": x.stride(2) if grouped else 0}
    return groups * group_blocks, arguments


def _strides(name: str, x: torch.Tensor | None, by_row: bool) -> dict[str, object]:
    """By batch entry and step; tables of rows have the latter only."""
    batch, time = (0, 0) if x is None else (0, x.stride(0)) if by_row else (x.stride(0), x.stride(1))
    return {f"{name}_batch": batch, f"{name}_time": time}


def scan_forward_workspace(**_: object) -> int:
    """Bytes of scratch memory."""
    return 0


def scan_forward(
    delta_softplus: int,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    out: torch.Tensor,
    final_state: torch.Tensor,
    checkpoints: torch.Tensor | None,
    workspace: torch.Tensor,
) -> None:
    """rom_scan_forward of csrc/include/rom/scan.h."""
    blocks, arguments = _problem(u, delta, A, B, C, z, row_index, delta_softplus)
    slot, channel = (0, 0) if checkpoints is None else checkpoints.stride()[:2]
    if checkpoints is not None and checkpoints.shape[1:] != A.shape:
        checkpoints.zero_()  # the padding: what an operator returns is defined
    programs = final_state.shape[0] * blocks
    if programs > 0:
        forward_kernel[(programs,)](
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, row_index, out, final_state, checkpoints,
            slot_stride=slot, channel_stride=channel, STAGES=FORWARD_STAGES, **arguments,
        )  # fmt: skip


def _segments(sequences: int, blocks: int) -> int:
    """How many runs of sequences get programs of their own: a function of shapes, so every GPU gives the same bits."""
    return min(sequences, max(MAX_PROGRAMS // max(blocks, 1), 1))


def _pieces(segments: int, blocks: int, arguments: dict, u: torch.Tensor, A: torch.Tensor) -> list[int]:
    """Values of partial_B, partial_C, lines_A, lines_D, lines_bias and states."""
    line, by_time = segments * A.numel(), blocks * u.shape[0] * u.shape[1] * A.shape[1]
    coefficients = [by_time if arguments[name] else line for name in ("B_BY_TIME", "C_BY_TIME")]
    tile = TILE * arguments["BLOCK"] * arguments["STATES"]
    return [*coefficients, line, segments * A.shape[0], segments * A.shape[0], segments * blocks * tile]


def scan_backward_workspace(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, z: torch.Tensor | None,
    row_index: torch.Tensor | None, cu_seqlens: torch.Tensor | None, **_: object,
) -> int:  # fmt: skip
    """Bytes of scratch memory."""
    blocks, arguments = _problem(u, delta, A, B, C, z, row_index, 0, backward=True)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sum(_pieces(_segments(sequences, blocks), blocks, arguments, u, A)) * A.element_size()


def _add_up(partials: torch.Tensor, out: torch.Tensor, count: int, many: int, groups: int, state: int) -> None:
    if out.numel() > 0:
        grid = (triton.cdiv(count, SUM_BLOCK), groups)
        sum_kernel[grid](partials, out, count, many, groups, STATE=state, BLOCK=SUM_BLOCK, num_warps=4)


def scan_backward(
    delta_softplus: int,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    checkpoints: torch.Tensor,
    grad_out: torch.Tensor,
    grad_final_state: torch.Tensor | None,
    grad_u: torch.Tensor,
    grad_delta: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    grad_C: torch.Tensor,
    grad_D: torch.Tensor | None,
    grad_z: torch.Tensor | None,
    grad_delta_bias: torch.Tensor | None,
    grad_initial_state: torch.Tensor | None,
    workspace: torch.Tensor,
) -> None:
    """rom_scan_backward of csrc/include/rom/scan.h."""
    blocks, arguments = _problem(u, delta, A, B, C, z, row_index, delta_softplus, backward=True)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments, rows, state = _segments(sequences, blocks), u.shape[0] * u.shape[1], A.shape[1]
    pieces = workspace.view(A.dtype).split(_pieces(segments, blocks, arguments, u, A))
    partial_B, partial_C, lines_A, lines_D, lines_bias, states = pieces
    if segments * blocks > 0:
        backward_kernel[(segments * blocks,)](
            u, delta, A, B, C, D, z, delta_bias, cu_seqlens, row_index, checkpoints, grad_out, grad_final_state,
            grad_u, grad_delta, grad_z, grad_initial_state, partial_B, partial_C, lines_A,
            None if D is None else lines_D, None if delta_bias is None else lines_bias, states,
            rows=rows, slot_stride=checkpoints.stride(0), channel_stride=checkpoints.stride(1), sequences=sequences,
            segments=segments, **_strides("grad_out", grad_out, row_index is not None), **arguments,
            STAGES=BACKWARD_STAGES,
        )  # fmt: skip
    for partials, grad in ((partial_B, grad_B), (partial_C, grad_C)):
        if grad.dim() == 4:
            shared = grad.shape[2]
            _add_up(partials, grad, rows * state, blocks // shared, shared, state)
        else:
            _add_up(partials, grad, grad.numel(), segments, 1, state)
    for lines, grad in ((lines_A, grad_A), (lines_D, grad_D), (lines_bias, grad_delta_bias)):
        if grad is not None:
            _add_up(lines, grad, grad.numel(), segments, 1, 1)
