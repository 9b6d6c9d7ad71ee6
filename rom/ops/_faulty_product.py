"""A faulty product, forward and backward, over two primitives: `patch` changes memory, `accumulate` changes sums."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from rom import native
from rom.faults.records import NO_TARGET, Target
from rom.ops import _faulty_gradients as gradients
from rom.ops import _faulty_sums as sums
from rom.ops import _op
from rom.reference import faults as reference
from rom.reference.faults import Events, Extents

Patch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Extents, Extents], None]
Accumulate = Callable[..., torch.Tensor]


# ------------------------------------------------------------------------------------------------ primitives
def kernel_patch(
    kernels: _op.Kernels,
    values: torch.Tensor,
    table: torch.Tensor,
    log: torch.Tensor,
    target: int,
    extents: Extents,
    strides: Extents,
) -> None:
    names = ("sample", "row", "col", "k")
    kernels.call(
        "fault_patch",
        values.device,
        target=target,
        element_bytes=values.element_size(),
        **{f"{name}s": extent for name, extent in zip(names, extents)},
        **{f"{name}_stride": stride for name, stride in zip(names, strides)},
        values=torch.as_strided(values, (values.numel(),), (1,)).view(torch.uint8),
        sites=table,
        log=log,
    )


def kernel_accumulate(
    kernels: _op.Kernels,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    table: torch.Tensor,
    events: Events,
    exact: bool,
) -> torch.Tensor:
    if a.dtype == torch.int8:  # sums of integers are exact in any order: nothing is gained by a second program
        return reference.accumulate(a, b, bias, y, table, events, exact)
    bits = native.empty((len(events.rows), 2), torch.int32, a.device)
    kernels.call(
        "fault_accumulate",
        a.device,
        exact=int(exact),
        a=a,
        b=b,
        bias=bias,
        y=y,
        sites=table,
        bits=bits,
        **events._asdict(),
    )
    return bits


# ------------------------------------------------------------------------------------------------ forward
def _patched(
    patch: Patch,
    values: torch.Tensor,
    table: torch.Tensor,
    log: torch.Tensor,
    target: Target,
    extents: Extents,
    present: list[int],
) -> torch.Tensor:
    """A copy with the target's sites applied; `values` itself where there are none.

    The copy keeps the strides: the library sums a transposed operand in another order.
    """
    if not present[target] or not (extents[0] or (table[sums.of(table, target), 0] == reference.ALL).any()):
        return values
    copy = values.clone()
    if values.dim() < 4:  # shared: [K, N] or [N]
        strides = (0, 0, copy.stride(-1), copy.stride(0) if copy.dim() == 2 else 0)
    else:
        k, row = (3, row_stride_of(copy)) if target == Target.A else (2, copy.stride(1))
        if row is None:
            copy = values.clone(memory_format=torch.contiguous_format)
            row = copy.stride(2)
        strides = (copy.stride(0), row, copy.stride(3) if target == Target.B else 0, copy.stride(k))
    patch(copy, table, log, target, extents, strides)
    return copy


def _present(table: torch.Tensor) -> list[int]:
    """How many sites each target has."""
    return torch.bincount(table[:, 6] & 0xFFFF, minlength=NO_TARGET + 1).tolist() if len(table) else [0] * 7


def _shapes(a: torch.Tensor, b: torch.Tensor) -> dict[Target, Extents]:
    """Extents of every target; 0 samples: shared memory."""
    (samples, heads, rows, k), cols = a.shape, b.shape[-1]
    result = (samples, heads * rows, cols, 0)
    return {
        Target.A: (samples, heads * rows, 0, k),
        Target.B: (0, 0, cols, k) if b.dim() == 2 else (samples, heads, cols, k),
        Target.ACCUMULATOR: (samples, heads * rows, cols, k + 1),
        Target.BEFORE_CAST: result,
        Target.OUTPUT: result,
        Target.BIAS: (0, 0, cols, 0),
    }


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[S, H, M, N]`, contiguous, by the library."""
    shape = (*a.shape[:-1], b.shape[-1])
    if a.dtype == torch.int8:  # sums below 2^53 are exact in float64, on every device
        return (a.double() @ b.double()).to(torch.int32).view(shape)
    if b.dim() == 4:
        y = torch.matmul(a, b)
        return y.contiguous() if bias is None else y + bias
    rows = a.flatten(0, 2)
    return (torch.mm(rows, b) if bias is None else torch.addmm(bias, rows, b)).view(shape)


def matmul_forward(
    patch: Patch,
    accumulate: Accumulate,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    log = table.new_zeros(len(table), 3)
    present, shapes = _present(table), _shapes(a, b)
    if not any(present[:6]) or not (a.numel() and b.numel()):
        return _product(a, b, bias), log
    if present[Target.BIAS] and bias is None:
        _op.fail("faulty_matmul", "a bias for the sites of target BIAS", "None")
    a, b = (
        _patched(patch, x, table, log, target, shapes[target], present) for x, target in ((a, Target.A), (b, Target.B))
    )
    if bias is not None:
        bias = _patched(patch, bias, table, log, Target.BIAS, shapes[Target.BIAS], present)
    y = _product(a, b, bias)
    wide = a.dtype not in (torch.bfloat16, torch.float16)  # nothing is cast: before the cast is the result
    if (
        present[Target.ACCUMULATOR]
        or (b.dim() == 2 and present[Target.B])
        or (present[Target.BEFORE_CAST] and not wide)
    ):
        four = b if b.dim() == 4 else b[None, None]
        compute = None if bias is None else bias.to(_op.compute_dtype(a.dtype)).contiguous()
        weights = sums.wrong_weights(patch, b, table, log, a.shape[0])
        events, entries = sums.events(table, log, weights, shapes[Target.ACCUMULATOR], a.shape[2], not wide)
        bits = accumulate(a, four, compute, y, table, events, exact)
        sums.record(log, events, entries, bits)
    for target in (Target.BEFORE_CAST, Target.OUTPUT):
        if present[target] and (wide or target == Target.OUTPUT):
            patch(y, table, log, target, shapes[target], sums.strides(shapes[target]))
    _check("faulty_matmul", log, table, shapes)
    return y, log


def _check(op: str, log: torch.Tensor, table: torch.Tensor, shapes: dict[Target, Extents]) -> None:
    """No site may name a place that is not there; a sample beyond this batch may be."""
    if int(log[:, 0].min()) >= 0:
        return
    at = int(log[:, 0].argmin())
    target = Target(int(table[at, 6]) & 0xFFFF)
    names = ("sample", "row", "col", "k")
    limits = ", ".join(f"{n} below {e}" for n, e in zip(names[1:], shapes[target][1:]) if e)
    got = ", ".join(f"{n} {int(v) & 0xFFFFFFFF}" for n, v in zip(names, table[at, :4]))
    extra = {
        Target.ACCUMULATOR: "; k a multiple of 32, or all",
        Target.BIAS: "; sample rom.faults.ALL",
    }.get(target, "")
    _op.fail(op, f"sites of {target.name} with {limits}{extra} (flags UPPER for float64)", f"{got} in site {at}")


def values_forward(patch: Patch, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log = table.new_zeros(len(table), 3)
    y, row_stride = x.clone(), row_stride_of(x)
    if row_stride is None or y.stride() != x.stride():
        y = x.clone(memory_format=torch.contiguous_format)
        row_stride = row_stride_of(y)
    assert row_stride is not None
    if len(table) and y.numel():
        extents = _value_extents(x)
        patch(y, table, log, Target.OUTPUT, extents, (y.stride(0), row_stride, y.stride(-1) if y.dim() > 1 else 0, 0))
        _check("faulty_values", log, table, {Target.OUTPUT: extents})
    return y, log


def _value_extents(x: torch.Tensor) -> Extents:
    cols = x.shape[-1] if x.dim() > 1 else 1
    return x.shape[0], x[0].numel() // cols, cols, 0


def row_stride_of(x: torch.Tensor) -> int | None:
    """The stride of the dimensions between the first and the last as one; None if they are not one."""
    dims = [(size, stride) for size, stride in zip(x.shape[1:-1], x.stride()[1:-1]) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(dims)):
        return None
    return dims[-1][1] if dims else 0


# ------------------------------------------------------------------------------------------------ backward
def matmul_backward(
    patch: Patch,
    accumulate: Accumulate,
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    log: torch.Tensor,
    exact: bool,
    mode: str,
    permanent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    present, shapes = _present(table), _shapes(a, b)
    faulty = mode != "clean" and any(present[:6]) and a.numel() and b.numel()
    clean_a, clean_b = a, b
    if faulty:
        if (table[:, 0] == reference.ALL).any():
            table = gradients.spelled_out(table, a.shape[0], b.dim() == 2)
            log = matmul_forward(patch, accumulate, a, b, bias, table, exact)[1]
        cast = a.dtype in (torch.bfloat16, torch.float16)
        compute = _op.compute_dtype(a.dtype)
        for target, dtype in ((Target.OUTPUT, a.dtype), (Target.BEFORE_CAST, compute if cast else a.dtype)):
            grad = gradients.scale(grad, table, log, target, shapes[target], dtype, mode)
        scratch = torch.zeros_like(log)
        patched = [_patched(patch, x, table, scratch, t, shapes[t], present) for x, t in ((a, Target.A), (b, Target.B))]
        if permanent:
            a, b = patched
        weights = sums.wrong_weights(patch, patched[1], table, scratch, a.shape[0])
    grad_bias = grad.new_empty(0) if bias is None else grad.sum((0, 1, 2), dtype=_op.compute_dtype(a.dtype)).to(a.dtype)
    if b.dim() == 2:
        flat = grad.flatten(0, 2)
        grads = torch.mm(flat, b.mT).view(a.shape), torch.mm(a.flatten(0, 2).mT, flat)
    else:
        grads = torch.matmul(grad, b.mT), torch.matmul(a.mT, grad)
    if not faulty:
        return *grads, grad_bias
    if present[Target.ACCUMULATOR] or len(weights.site):
        events, _ = sums.events(table, scratch, weights, shapes[Target.ACCUMULATOR], a.shape[2], False)
        grads = gradients.by_sums(grad, a, b, table, log, grads, weights, events, mode, permanent)
    scaled = [
        gradients.scale(g, table, log, target, shapes[target], clean.dtype, mode)
        for g, target, clean in ((grads[0], Target.A, clean_a), (grads[1], Target.B, clean_b))
    ]
    if bias is not None:
        grad_bias = gradients.scale(grad_bias, table, log, Target.BIAS, shapes[Target.BIAS], bias.dtype, mode)
    return scaled[0], scaled[1], grad_bias


def values_backward(
    patch: Patch, grad: torch.Tensor, x: torch.Tensor, table: torch.Tensor, log: torch.Tensor, mode: str
) -> torch.Tensor:
    if mode in ("ste", "clean") or not len(table) or not x.numel():
        return grad.clone()
    if (table[:, 0] == reference.ALL).any():
        table = gradients.spelled_out(table, x.shape[0], True)
        log = values_forward(patch, x, table)[1]
    return gradients.scale(grad.contiguous(), table, log, Target.OUTPUT, _value_extents(x), x.dtype, mode)
