"""Causal depthwise convolution, forward and backward.

A program owns a run of time steps and a block of channels, 16 bytes of a row per thread. It walks the run with the last
width inputs in registers, so that every row is read once, and the width - 1 before (backward: and after) the run once
more. Packed sequences: the run finds its sequence by a binary search, and starts afresh where one ends. The host
functions take what the native kernels of the same names take (csrc/include/rom/conv.h).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = tl.constexpr(4)  # taken at a time
# Blocks of ROWS: the one at work, and those copied to shared memory meanwhile, 64 KB per SM. Plain loads are worse:
# the compiler does not keep them together, backward waits for the first three of eight. Where rows are looked up, or
# sequences end inside a run, it would copy indices and states too, with a barrier each: those get one stage.
STAGES = 3
# Channels per thread, if that fits 16 bytes: two tensors and the sums backward need over 200 registers with 8.
VALUES_FORWARD, VALUES_BACKWARD = 8, 4
MIN_STEPS, MAX_STEPS = 16, 256  # time steps of a run
ENOUGH_WARPS = 2048  # 16 for each SM of an H200


# ------------------------------------------------------------------------------------------------ sequences and rows
@triton.jit
def wide(i):
    """For products with a stride: time steps are counted in 32 bits, offsets in 64."""
    return tl.cast(i, tl.int64)


@triton.jit
def _sequence(cu_seqlens, sequences, batch, length, t):
    """(number, start, end) of the sequence that step t of a batch row belongs to."""
    if cu_seqlens is None:
        return batch, 0, length
    else:
        low, high = tl.cast(0, tl.int32), tl.cast(sequences, tl.int32)
        while high - low > 1:  # cu_seqlens[low] <= t < cu_seqlens[high]
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) <= t
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        return low, tl.load(cu_seqlens + low), tl.load(cu_seqlens + low + 1)


@triton.jit
def _next_sequence(cu_seqlens, sequences, number, start):
    """(number, end) of the sequence that starts where `number` ends; empty ones are passed over."""
    end = start
    while (end <= start) & (number + 1 < sequences):
        number += 1
        end = tl.load(cu_seqlens + number + 1)
    return number, end


@triton.jit
def _table(rows, row_index, batch, length, batch_stride, stride, PER_STEP: tl.constexpr):
    """A batch row as (rows, its part of row_index, stride from row to row); a row per step where PER_STEP is 0."""
    rows += wide(batch) * batch_stride
    index = rows if PER_STEP == 0 else row_index + wide(batch) * length * PER_STEP  # a tuple cannot hold None
    return rows, index, stride


@triton.jit
def _row(table, t, k, valid, PER_STEP: tl.constexpr):
    """Where row k of step t begins."""
    rows, row_index, stride = table
    row = t if PER_STEP == 0 else tl.load(row_index + t * PER_STEP + k, mask=valid, other=0)
    return rows + wide(row) * stride


@triton.jit
def _input(x, t, channels, valid, PER_STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """x_t, the sum of its rows in the table x; zero where not `valid`. Channels are (numbers, which exist)."""
    c, inside = channels
    total = tl.load(_row(x, t, 0, valid, PER_STEP) + c, mask=inside & valid, other=0.0).to(COMPUTE)
    for k in tl.static_range(1, PER_STEP):
        total += tl.load(_row(x, t, k, valid, PER_STEP) + c, mask=inside & valid, other=0.0).to(COMPUTE)
    return total


@triton.jit
def _place(state, number, channels, dim, i, WIDTH: tl.constexpr):
    """Where place i of a sequence's state (sequences, dim, WIDTH) is."""
    return state + (wide(number) * dim + channels[0]) * WIDTH + i


@triton.jit
def _tap(
    x, initial_state, t, number, start, channels, dim,
    WIDTH: tl.constexpr, PER_STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Input t of a sequence, from before its start too (t >= start - WIDTH): its initial state, or zero."""
    value = _input(x, t, channels, t >= start, PER_STEP, COMPUTE)
    if initial_state is not None:
        place = _place(initial_state, number, channels, dim, WIDTH + t - start, WIDTH)
        value += tl.load(place, mask=channels[1] & (t < start), other=0.0)
    return value


@triton.jit
def _window(
    x, initial_state, t, number, start, channels, dim,
    WIDTH: tl.constexpr, PER_STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 inputs before step t of a sequence, oldest first."""
    window = ()
    for j in tl.static_range(1 - WIDTH, 0):
        window += (_tap(x, initial_state, t + j, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE),)
    return window


# ------------------------------------------------------------------------------------------------ arithmetic
@triton.jit
def _parameters(weight, bias, channels, dim, WIDTH: tl.constexpr):
    """(the taps, oldest first; the bias)"""
    c, inside = channels
    taps = ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight + k * dim + c, mask=inside, other=0.0),)
    return taps, tl.zeros_like(taps[0]) if bias is None else tl.load(bias + c, mask=inside, other=0.0)


@triton.jit
def _before_activation(window, taps, bias, WIDTH: tl.constexpr):
    pre = bias
    for k in tl.static_range(WIDTH):
        pre += taps[k] * window[k]
    return pre


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in 5 instructions: exp and a division guard denormal and huge numbers in 7 more."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def _through_activation(grad, window, taps, bias, SILU: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient of what stands before the activation."""
    if SILU:
        pre = _before_activation(window, taps, bias, WIDTH)
        gate = sigmoid(pre)
        grad *= gate + pre * gate * (1.0 - gate)
    return grad


@triton.jit
def _accumulate(sums, g, window, WIDTH: tl.constexpr):
    """Adds one step's share of grad_weight and, in the last place, grad_bias."""
    total = ()
    for k in tl.static_range(WIDTH):
        total += (sums[k] + g * window[k],)
    total += (sums[WIDTH] + g,)
    return total


@triton.jit
def _pass_back(pending, taps, g, WIDTH: tl.constexpr):
    """`pending` with one step's share, for the inputs of its window."""
    known = ()
    for k in tl.static_range(WIDTH - 1):
        known += (pending[k] + taps[k] * g,)
    known += (taps[WIDTH - 1] * g,)
    return known


@triton.jit
def _repeat(value, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (value,)
    return values


# ------------------------------------------------------------------------------------------------ forward
@triton.jit
def _run(length, dim, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """(batch row, first step, step after the last, channels) of this program."""
    blocks, runs = tl.cdiv(dim, BLOCK), tl.cdiv(length, STEPS)
    program = tl.program_id(0)
    c, begin = program % blocks * BLOCK + tl.arange(0, BLOCK), program // blocks % runs * STEPS
    return program // blocks // runs, begin, tl.minimum(begin + STEPS, length), (c, c < dim)


@triton.jit
def forward_kernel(
    x, weight, bias, initial_state, cu_seqlens, row_index, out,
    length, dim, sequences, x_batch, x_step,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PER_STEP: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One run of STEPS time steps of BLOCK channels."""
    batch, begin, stop, channels = _run(length, dim, STEPS, BLOCK)
    c, inside = channels
    out += wide(batch) * length * dim
    x = _table(x, row_index, batch, length, x_batch, x_step, PER_STEP)
    taps, b = _parameters(weight, bias, channels, dim, WIDTH)
    number, start, end = _sequence(cu_seqlens, sequences, batch, length, begin)
    window = _window(x, initial_state, begin, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)
    for t0 in tl.range(begin, stop, ROWS, num_stages=STAGES):
        rows = ()
        for r in tl.static_range(ROWS):
            rows += (_input(x, t0 + r, channels, t0 + r < stop, PER_STEP, COMPUTE),)
        for r in tl.static_range(ROWS):
            t = t0 + r
            window += (rows[r],)
            y = _before_activation(window, taps, b, WIDTH)
            if SILU:
                y *= sigmoid(y)
            tl.store(out + wide(t) * dim + c, y.to(out.dtype.element_ty), mask=inside & (t < stop))
            window = window[1:]
            if cu_seqlens is not None and t + 1 == end:
                start = end
                number, end = _next_sequence(cu_seqlens, sequences, number, start)
                window = _window(x, initial_state, start, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)


@triton.jit
def _whole_sequence(cu_seqlens, length, dim, BLOCK: tl.constexpr):
    """(number, batch row, start, end, channels) of this program's sequence."""
    blocks = tl.cdiv(dim, BLOCK)
    number = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if cu_seqlens is None:
        return number, number, 0, length, (c, c < dim)
    else:
        return number, 0, tl.load(cu_seqlens + number), tl.load(cu_seqlens + number + 1), (c, c < dim)


@triton.jit
def final_state_kernel(
    x, initial_state, cu_seqlens, row_index, final_state,
    length, dim, x_batch, x_step,
    WIDTH: tl.constexpr, PER_STEP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The last WIDTH inputs of one sequence, those before its start included."""
    number, batch, start, end, channels = _whole_sequence(cu_seqlens, length, dim, BLOCK)
    x = _table(x, row_index, batch, length, x_batch, x_step, PER_STEP)
    for k in tl.static_range(WIDTH):
        t = end - WIDTH + k
        value = _tap(x, initial_state, t, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)
        tl.store(_place(final_state, number, channels, dim, k, WIDTH), value, mask=channels[1])


# ------------------------------------------------------------------------------------------------ backward
@triton.jit
def _complete(
    grad_x, grad_final_state, t, grad, first, stop, number, end, channels, dim,
    WIDTH: tl.constexpr, PER_STEP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of input t to each of its rows, if the input is the run's own: first <= t < stop.

    The last WIDTH inputs of a sequence are its final state.
    """
    c, inside = channels
    valid = (t >= first) & (t < stop)
    if grad_final_state is not None:
        place = _place(grad_final_state, number, channels, dim, WIDTH + t - end, WIDTH)
        grad += tl.load(place, mask=inside & valid & (t >= end - WIDTH), other=0.0)
    value = grad.to(grad_x[0].dtype.element_ty)
    tl.store(_row(grad_x, t, 0, valid, PER_STEP) + c, value, mask=inside & valid)
    for k in tl.static_range(1, PER_STEP):
        tl.store(_row(grad_x, t, k, valid, PER_STEP) + c, value, mask=inside & valid)


@triton.jit
def backward_kernel(
    x, weight, bias, initial_state, cu_seqlens, row_index, grad_out, grad_final_state, grad_x, lines,
    length, dim, sequences, x_batch, x_step, grad_out_batch, grad_out_step, grad_x_batch, grad_x_step,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PER_STEP: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One run: the gradient of its inputs, and its share of grad_weight and grad_bias (a line of `lines`).

    With g_t = grad_out_t · act'(pre_t): grad_x_{t - WIDTH + 1 + k} += weight_k g_t, grad_weight_k += g_t x_{the same}.
    So step t completes the gradient of the oldest input of its window, and the last step of a sequence that of all.
    """
    batch, begin, stop, channels = _run(length, dim, STEPS, BLOCK)
    c, inside = channels
    x = _table(x, row_index, batch, length, x_batch, x_step, PER_STEP)
    grad_x = _table(grad_x, row_index, batch, length, grad_x_batch, grad_x_step, PER_STEP)
    grad_out = _table(grad_out, None, batch, length, grad_out_batch, grad_out_step, 0)
    taps, b = _parameters(weight, bias, channels, dim, WIDTH)
    number, start, end = _sequence(cu_seqlens, sequences, batch, length, begin)
    window = _window(x, initial_state, begin, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)
    zero = tl.zeros([BLOCK], COMPUTE)
    # pending[k]: what is known of the gradient of window[k]. Of inputs before `first` it is never stored, nor right.
    pending, sums = _repeat(zero, WIDTH - 1), _repeat(zero, WIDTH + 1)
    for t0 in tl.range(begin, stop, ROWS, num_stages=STAGES):
        rows, grads = (), ()
        for r in tl.static_range(ROWS):
            rows += (_input(x, t0 + r, channels, t0 + r < stop, PER_STEP, COMPUTE),)
            grads += (_input(grad_out, t0 + r, channels, t0 + r < stop, 0, COMPUTE),)
        for r in tl.static_range(ROWS):
            t = t0 + r
            window += (rows[r],)
            g = _through_activation(grads[r], window, taps, b, SILU, WIDTH)
            sums = _accumulate(sums, g, window, WIDTH)
            known = _pass_back(pending, taps, g, WIDTH)
            first = tl.maximum(start, begin)
            _complete(
                grad_x, grad_final_state, t + 1 - WIDTH, known[0], first, stop, number, end, channels, dim,
                WIDTH, PER_STEP,
            )  # fmt: skip
            pending, window = known[1:], window[1:]
            if cu_seqlens is not None and t + 1 == end:
                for k in tl.static_range(WIDTH - 1):
                    _complete(
                        grad_x, grad_final_state, t + 2 - WIDTH + k, pending[k], first, stop, number, end, channels,
                        dim, WIDTH, PER_STEP,
                    )  # fmt: skip
                start = end
                number, end = _next_sequence(cu_seqlens, sequences, number, start)
                window = _window(x, initial_state, start, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)
    first = tl.maximum(start, begin)
    for j in tl.static_range(WIDTH - 1):  # the next run's first steps complete this one's last inputs
        t = begin + tl.cdiv(stop - begin, ROWS) * ROWS + j
        window += (_input(x, t, channels, t < end, PER_STEP, COMPUTE),)
        g = _input(grad_out, t, channels, t < end, 0, COMPUTE)
        known = _pass_back(pending, taps, _through_activation(g, window, taps, b, SILU, WIDTH), WIDTH)
        _complete(
            grad_x, grad_final_state, t + 1 - WIDTH, known[0], first, stop, number, end, channels, dim,
            WIDTH, PER_STEP,
        )  # fmt: skip
        pending, window = known[1:], window[1:]
    lines += (wide(batch) * tl.cdiv(length, STEPS) + begin // STEPS) * (WIDTH + 1) * dim
    for k in tl.static_range(WIDTH + 1):
        tl.store(lines + k * dim + c, sums[k], mask=inside)


@triton.jit
def reduce_kernel(
    lines, grad_weight, grad_bias, count, dim,
    WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds the lines, each (WIDTH + 1, dim), in an order that depends on their number only."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    size = (WIDTH + 1) * dim
    total = tl.zeros([LINES, COLUMNS], COMPUTE)
    for first in range(0, count, LINES):
        line = (first + tl.arange(0, LINES))[:, None]
        total += tl.load(lines + wide(line) * size + c[None, :], mask=(line < count) & (c < size)[None, :], other=0.0)
    line = tl.sum(total, 0)
    tl.store(grad_weight + c, line, mask=c < WIDTH * dim)
    tl.store(grad_bias + (c - WIDTH * dim), line, mask=(c >= WIDTH * dim) & (c < size))


@triton.jit
def grad_initial_kernel(
    x, weight, bias, initial_state, cu_seqlens, row_index, grad_out, grad_final_state, grad_initial_state,
    length, dim, x_batch, x_step, grad_out_batch, grad_out_step,
    SILU: tl.constexpr, WIDTH: tl.constexpr, PER_STEP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence's initial state: from its first WIDTH - 1 steps, and, of what a sequence shorter
    than WIDTH passes on, from its final state."""
    number, batch, start, end, channels = _whole_sequence(cu_seqlens, length, dim, BLOCK)
    x = _table(x, row_index, batch, length, x_batch, x_step, PER_STEP)
    grad_out = _table(grad_out, None, batch, length, grad_out_batch, grad_out_step, 0)
    taps, b = _parameters(weight, bias, channels, dim, WIDTH)
    window = _window(x, initial_state, start, number, start, channels, dim, WIDTH, PER_STEP, COMPUTE)
    grads = ()
    for j in tl.static_range(WIDTH - 1):
        window += (_input(x, start + j, channels, start + j < end, PER_STEP, COMPUTE),)
        g = _input(grad_out, start + j, channels, start + j < end, 0, COMPUTE)
        grads += (_through_activation(g, window, taps, b, SILU, WIDTH),)
        window = window[1:]
    for i in tl.static_range(WIDTH):
        grad = tl.zeros([BLOCK], COMPUTE)
        for j in tl.static_range(i):  # place i of the state meets tap i - 1 - j at step j
            grad += taps[i - 1 - j] * grads[j]
        if grad_final_state is not None:
            passed = _place(grad_final_state, number, channels, dim, i - (end - start), WIDTH)
            grad += tl.load(passed, mask=channels[1] & (start + i >= end), other=0.0)
        tl.store(_place(grad_initial_state, number, channels, dim, i, WIDTH), grad, mask=channels[1])


# ------------------------------------------------------------------------------------------------ host
def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What values of this dtype are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _block(x: torch.Tensor, values: int) -> dict[str, int]:
    """A block of channels, `values` per thread or what 16 bytes hold: up to 4 warps, if that divides dim."""
    dim, warps = x.shape[-1], 1
    warp = 32 * min(values, 16 // x.element_size())
    while warps < 4 and dim % (2 * warps * warp) == 0:
        warps *= 2
    return {"BLOCK": warps * warp, "num_warps": warps}


def _steps(dim: int, batch: int, length: int, block: dict[str, int]) -> int:
    """Steps of a run: long ones as long as there are enough. A function of the shape: every GPU gives the same bits."""
    steps, warps = MAX_STEPS, batch * triton.cdiv(dim, block["BLOCK"]) * block["num_warps"]
    while steps > MIN_STEPS and warps * triton.cdiv(length, steps) < ENOUGH_WARPS:
        steps //= 2
    return steps


def _stages(*irregular: torch.Tensor | None) -> int:
    """STAGES for plain rows, one where any of these is given."""
    return STAGES if all(tensor is None for tensor in irregular) else 1


def _time(x: torch.Tensor, row_index: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """(batch, length, rows per step or 0, stride from batch row to batch row, stride from row to row)."""
    if row_index is None:
        return x.shape[0], x.shape[1], 0, x.stride(0), x.stride(1)
    return *row_index.shape, 0, x.stride(0)  # type: ignore[return-value]


def conv_forward(
    silu: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
) -> None:
    """rom_conv_forward of csrc/include/rom/conv.h."""
    width, dim = weight.shape
    batch, length, per_step, x_batch, x_step = _time(x, row_index)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    block = _block(x, VALUES_FORWARD)
    steps, blocks = _steps(dim, batch, length, block), triton.cdiv(dim, block["BLOCK"])
    kind = {"WIDTH": width, "PER_STEP": per_step, "COMPUTE": compute_type(x.dtype), **block}
    if out.numel() > 0:
        forward_kernel[(batch * triton.cdiv(length, steps) * blocks,)](
            x, weight, bias, initial_state, cu_seqlens, row_index, out,
            length, dim, sequences, x_batch, x_step,
            SILU=bool(silu), STEPS=steps, STAGES=_stages(cu_seqlens, row_index), **kind,
        )  # fmt: skip
    if final_state is not None and final_state.numel() > 0:
        final_state_kernel[(sequences * blocks,)](
            x, initial_state, cu_seqlens, row_index, final_state, length, dim, x_batch, x_step, **kind
        )


def conv_backward_workspace(x: torch.Tensor, weight: torch.Tensor, row_index: torch.Tensor | None, **_: object) -> int:
    """Bytes of scratch memory: a line of grad_weight and grad_bias per run."""
    width, dim = weight.shape
    batch, length, *_ = _time(x, row_index)
    runs = batch * triton.cdiv(length, _steps(dim, batch, length, _block(x, VALUES_BACKWARD)))
    return runs * (width + 1) * dim * weight.element_size()


def conv_backward(
    silu: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_final_state: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    grad_initial_state: torch.Tensor | None,
    workspace: torch.Tensor,
) -> None:
    """rom_conv_backward of csrc/include/rom/conv.h."""
    width, dim = weight.shape
    batch, length, per_step, x_batch, x_step = _time(x, row_index)
    *_, grad_x_batch, grad_x_step = _time(grad_x, row_index)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    block = _block(x, VALUES_BACKWARD)
    steps = _steps(dim, batch, length, block)
    blocks, runs = triton.cdiv(dim, block["BLOCK"]), batch * triton.cdiv(length, steps)
    lines = workspace.view(weight.dtype)
    kind = {"SILU": bool(silu), "WIDTH": width, "PER_STEP": per_step, "COMPUTE": compute_type(x.dtype), **block}
    if grad_out.numel() > 0:
        backward_kernel[(runs * blocks,)](
            x, weight, bias, initial_state, cu_seqlens, row_index, grad_out, grad_final_state, grad_x, lines,
            length, dim, sequences, x_batch, x_step, *grad_out.stride()[:2], grad_x_batch, grad_x_step,
            STEPS=steps, STAGES=_stages(cu_seqlens, row_index, grad_final_state), **kind,
        )  # fmt: skip
    if dim > 0:
        columns = 32
        reduce_kernel[(triton.cdiv((width + 1) * dim, columns),)](
            lines, grad_weight, grad_bias, runs, dim,
            WIDTH=width, LINES=64, COLUMNS=columns, COMPUTE=compute_type(x.dtype), num_warps=4,
        )  # fmt: skip
    if grad_initial_state is not None and grad_initial_state.numel() > 0:
        grad_initial_kernel[(sequences * blocks,)](
            x, weight, bias, initial_state, cu_seqlens, row_index, grad_out, grad_final_state, grad_initial_state,
            length, dim, x_batch, x_step, *grad_out.stride()[:2], **kind,
        )  # fmt: skip
