"""`faulty_matmul` and `faulty_values`: a matrix product, and a tensor, with some bits wrong."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from rom import dispatch, native
from rom.faults import records
from rom.ops import _faulty_product as product
from rom.ops import _op
from rom.reference import faults as reference

DTYPES = (*_op.FLOATING, torch.int8)
MODES = ("exact", "fast")
GRADIENTS = ("true", "ste", "zero", "clean")
PERSISTENCE = ("transient", "permanent")
NAN_TO = ("max", "zero", "keep")
Sites = np.ndarray | torch.Tensor


def faulty_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    sites: Sites,
    bias: torch.Tensor | None = None,
    *,
    mode: str = "exact",
    grad: str = "true",
    persistence: str = "transient",
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`a @ b + bias` with bits wrong in operands, accumulators, bias or result. Nothing is changed in place.

        A' = patch(a);  B' = patch(b);  Y[s, row, col] = Σ_k A'[s, row, k] B'[k, col] + bias'[col],

    the sum patched after its k-th product, then patched once whole, cast, patched, and restricted to `bounds`.
    Everything that no site touches comes from torch's own matrix product, bit for bit.

    Args:
        a: `[S, ..., K]`; the first dimension is the sample of a site, the ones between are its row, flattened. float32,
            bfloat16, float16, float64, or int8 (accumulator and result int32, no bias).
        b: `[K, N]`, dtype of a, shared by all samples; `weight.mT` of a linear layer. A site of target B with a sample
            makes the weight wrong for that sample only, one with `rom.faults.ALL` for all. Or `[S, ..., K, N]` for a of
            `[S, ..., M, K]` with the same leading dimensions; a site's row then counts the matrices of a sample.
        sites: records of dtype `rom.faults.SITE`, or their int32 `[n, 8]` table on a's device; applied in this order.
        bias: `[N]`, dtype of a.
        mode: "exact" sums the products of a touched sum again, in order of k, and goes on with the changed value.
            "fast" adds the difference to the library's sum: alike to rounding while values are finite.
        grad: the derivative of a changed value by the value it was: "true" (−1 for a sign, 2^Δe for an exponent, 1 for
            a mantissa bit, 0 for a word replaced or a value that is not finite), "ste" 1, "zero" 0; "clean": the
            gradients of the product without faults.
        persistence: "transient": the backward products read the correct operands. "permanent": the faulty ones.
        bounds: (low, high); range restriction of the whole result, as with the profiled extremes of a layer.
        nan_to: with bounds, NaN becomes high ("max"), 0 ("zero"), or stays ("keep").

    Returns:
        `(y, log)`: y `[S, ..., N]` in a's dtype (int32 for int8), and an int32 `[n, 3]` log: status (1 applied, 0 the
        sample is not in this batch), and the word before and after (of the first sample, for a site of all);
        `rom.faults.log_records` reads it.

    Accumulators are float32 (float64 for float64, int32 for int8). There are no second derivatives. Under autocast a, b
    and bias are cast to its dtype.

    Raises:
        ValueError: shapes or options do not fit, or a site lies outside of its operand. TypeError: a dtype.

    Source: the fault model of PyTorchFI and GoldenEye (DSN 2022), at the bits of IEEE values.

    >>> from rom import faults
    >>> sign = faults.sites(faults.Target.B, faults.flip(1 << 31), sample=1, k=0, col=1)
    >>> rom.ops.faulty_matmul(torch.ones(3, 2), torch.eye(2), sign)[0]
    tensor([[1., 1.],
            [1., 1.],
            [1., 1.]])
    >>> sign["k"] = 1
    >>> rom.ops.faulty_matmul(torch.ones(3, 2), torch.eye(2), sign)[0]
    tensor([[ 1.,  1.],
            [ 1., -1.],
            [ 1.,  1.]])
    """
    op = "faulty_matmul"
    a, b, bias = _op.autocast(a), _op.autocast(b), _op.autocast(bias)
    _validate(a, b, bias, mode, grad, persistence, nan_to)
    table = _table(op, sites, a)
    left = a.reshape(a.shape[0], 1, a.shape[1:-1].numel(), a.shape[-1]) if b.dim() == 2 else _matrices(a)
    right = b if b.dim() == 2 else _matrices(b)
    backend = dispatch.choose(op, a.device.type)
    options = (mode == "exact", grad, persistence == "permanent")
    y, log = torch.ops.rom.faulty_matmul(left, right, bias, table, *options, backend)
    y = y.view(*a.shape[:-1], b.shape[-1])
    return (y if bounds is None else restrict(y, bounds, nan_to)), log


def faulty_values(x: torch.Tensor, sites: Sites, *, grad: str = "true") -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x with bits wrong: what a fault does to the result of any layer.

    Args:
        x: `[S, ..., C]`, any dtype of `faulty_matmul` or int32; sample, row (the dimensions between, flattened) and col
            name a value. Any strides; the copy keeps them.
        sites: as for `faulty_matmul`, of target OUTPUT; others are not applied.
        grad: as for `faulty_matmul`.

    Returns:
        `(y, log)` as `faulty_matmul`.

    Raises:
        ValueError: a site lies outside of x, or x has no dimension. TypeError: a dtype.

    >>> from rom import faults
    >>> site = faults.sites(faults.Target.OUTPUT, faults.flip(1 << 23), sample=1, col=2)
    >>> y, log = rom.ops.faulty_values(torch.ones(2, 3), site)
    >>> y[1], faults.log_records(log)["new"]
    (tensor([1.0000, 1.0000, 0.5000]), array([1056964608], dtype=uint32))
    """
    op = "faulty_values"
    _op.check_tensors(op, "x", x=x)
    if x.dtype not in (*DTYPES, torch.int32):
        raise TypeError(f"rom.ops.{op}: expected x of dtype float64, …, int32 or int8, got {x.dtype}.")
    if x.dim() == 0:
        _op.fail(op, "x of shape [S, ..., C]", "a scalar")
    _choice(op, "grad", grad, GRADIENTS)
    return torch.ops.rom.faulty_values(x, _table(op, sites, x), grad, dispatch.choose(op, x.device.type))


def restrict(y: torch.Tensor, bounds: tuple[float, float], nan_to: str = "max") -> torch.Tensor:
    """Range restriction: y clamped to (low, high), NaN replaced as `nan_to` says (see `faulty_matmul`)."""
    low, high = bounds
    if not low <= high:
        _op.fail("faulty_matmul", "bounds with low ≤ high", str(bounds))
    _choice("faulty_matmul", "nan_to", nan_to, NAN_TO)
    y = y.clamp(low, high)
    return y if nan_to == "keep" else torch.where(y.isnan(), high if nan_to == "max" else 0.0, y)


def _choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _op.fail(op, f"{name} of {', '.join(allowed)}", repr(value))


def _matrices(x: torch.Tensor) -> torch.Tensor:
    """`[S, ..., rows, cols]` as `[S, H, rows, cols]`."""
    return x.reshape(x.shape[0], x.shape[1:-2].numel(), *x.shape[-2:])


def _table(op: str, sites: Sites, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(sites, torch.Tensor):
        return records.to_tensor(sites, like.device)
    if sites.dtype != torch.int32 or sites.dim() != 2 or sites.shape[1] != records.WORDS:
        raise TypeError(f"rom.ops.{op}: expected sites int32 [n, 8], got {sites.dtype} {_op.shape(sites)}.")
    _op.check_tensors(op, "values", values=like, sites=sites)
    return sites


def _validate(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    mode: str,
    grad: str,
    persistence: str,
    nan_to: str,
) -> None:
    op = "faulty_matmul"
    _op.check_tensors(op, "a", a=a, b=b, bias=bias)
    if a.dtype not in DTYPES:
        raise TypeError(
            f"rom.ops.{op}: expected a of dtype float32, bfloat16, float16, float64 or int8, got {a.dtype}."
        )
    _op.check_same_dtype(op, "a", a=a, b=b, bias=bias)
    if a.dtype == torch.int8 and bias is not None:
        raise TypeError(f"rom.ops.{op}: expected no bias for int8 operands: add it to the int32 result.")
    if a.dim() < 2:
        _op.fail(op, "a of shape [S, ..., K]", str(_op.shape(a)), "One sample is a of shape (1, K).")
    if b.dim() != 2 and (b.dim() != a.dim() or a.shape[:-2] != b.shape[:-2] or b.dim() < 3):
        _op.fail(op, f"b of shape [K, N] or {list(a.shape[:-2])} + [K, N]", str(_op.shape(b)), "Expand it.")
    if b.shape[-2] != a.shape[-1]:
        _op.fail(op, f"b with K = {a.shape[-1]} rows like a's last dimension", str(_op.shape(b)))
    _op.check_shape(op, "bias", bias, (b.shape[-1],))
    _choice(op, "mode", mode, MODES)
    _choice(op, "grad", grad, GRADIENTS)
    _choice(op, "persistence", persistence, PERSISTENCE)
    _choice(op, "nan_to", nan_to, NAN_TO)


# ------------------------------------------------------------------------------------------------ backends
_TRITON = "rom.triton_kernels.faults"


def _primitives(kernels: _op.Kernels) -> tuple[product.Patch, product.Accumulate]:
    return partial(product.kernel_patch, kernels), partial(product.kernel_accumulate, kernels)


PATCHES: dict[str, product.Patch] = {}  # by backend: sites of one target into memory, in place
for _backend, (_patch, _accumulate), _names, _module in (
    ("triton", _primitives(_op.Triton(_TRITON)), (), _TRITON),
    ("cpu", _primitives(native), ("fault_patch", "fault_accumulate"), None),
    ("reference", (reference.patch, reference.accumulate), (), None),
):
    PATCHES[_backend] = _patch
    dispatch.register(
        "faulty_matmul",
        _backend,
        partial(product.matmul_forward, _patch, _accumulate),
        partial(product.matmul_backward, _patch, _accumulate),
        kernels=_names,
        module=_module,
    )
    dispatch.register(
        "faulty_values",
        _backend,
        partial(product.values_forward, _patch),
        partial(product.values_backward, _patch),
        kernels=_names[:1],
        module=_module,
    )


# ------------------------------------------------------------------------------------------------ registration
_op.define(
    "faulty_matmul(Tensor a, Tensor b, Tensor? bias, Tensor sites, bool exact, str grad, bool permanent, str backend)"
    " -> (Tensor, Tensor)"
)
_op.define(
    "faulty_matmul_backward(Tensor grad_y, Tensor a, Tensor b, Tensor? bias, Tensor sites, Tensor log, bool exact,"
    " str grad, bool permanent, str backend) -> (Tensor, Tensor, Tensor)"
)
_op.define("faulty_values(Tensor x, Tensor sites, str grad, str backend) -> (Tensor, Tensor)")
_op.define("faulty_values_backward(Tensor grad_y, Tensor x, Tensor sites, Tensor log, str grad, str backend) -> Tensor")


def _matmul(a, b, bias, sites, exact, grad, permanent, backend):  # type: ignore[no-untyped-def]
    return dispatch.implementation("faulty_matmul", backend).forward(a, b, bias, sites.contiguous(), exact)


def _values(x, sites, grad, backend):  # type: ignore[no-untyped-def]
    return dispatch.implementation("faulty_values", backend).forward(x, sites.contiguous())


def _backward(op, *arguments):  # type: ignore[no-untyped-def]
    *given, backend = arguments
    run = dispatch.implementation(op, backend).backward
    assert run is not None
    return run(*given)


_op.LIBRARY.impl("faulty_matmul", _matmul, "CompositeExplicitAutograd")
_op.LIBRARY.impl("faulty_values", _values, "CompositeExplicitAutograd")
_op.LIBRARY.impl("faulty_matmul_backward", partial(_backward, "faulty_matmul"), "CompositeExplicitAutograd")
_op.LIBRARY.impl("faulty_values_backward", partial(_backward, "faulty_values"), "CompositeExplicitAutograd")


@torch.library.register_fake("rom::faulty_matmul")
def _(a, b, bias, sites, exact, grad, permanent, backend):  # type: ignore[no-untyped-def]
    dtype = torch.int32 if a.dtype == torch.int8 else a.dtype
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype), sites.new_empty(sites.shape[0], 3)


@torch.library.register_fake("rom::faulty_matmul_backward")
def _(grad_y, a, b, bias, sites, log, exact, grad, permanent, backend):  # type: ignore[no-untyped-def]
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        grad_y.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


@torch.library.register_fake("rom::faulty_values")
def _(x, sites, grad, backend):  # type: ignore[no-untyped-def]
    y = torch.empty_like(x)
    return (
        y if product.row_stride_of(x) is not None and y.stride() == x.stride() else x.new_empty(x.shape)
    ), sites.new_empty(sites.shape[0], 3)


@torch.library.register_fake("rom::faulty_values_backward")
def _(grad_y, x, sites, log, grad, backend):  # type: ignore[no-untyped-def]
    return grad_y.new_empty(grad_y.shape)


def _matmul_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, b, bias, sites, ctx.exact, ctx.grad, ctx.permanent, ctx.backend = inputs
    ctx.save_for_backward(a, b, bias, sites, output[1])


def _matmul_autograd(ctx, grad_y, _):  # type: ignore[no-untyped-def]
    options = (ctx.exact, ctx.grad, ctx.permanent, ctx.backend)
    grads = torch.ops.rom.faulty_matmul_backward(grad_y, *ctx.saved_tensors, *options)
    kept = (g if need else None for g, need in zip(grads, ctx.needs_input_grad))
    return *kept, None, None, None, None, None


def _values_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, sites, ctx.grad, ctx.backend = inputs
    ctx.save_for_backward(x, sites, output[1])


def _values_autograd(ctx, grad_y, _):  # type: ignore[no-untyped-def]
    return (
        torch.ops.rom.faulty_values_backward(grad_y, *ctx.saved_tensors, ctx.grad, ctx.backend),
        None,
        None,
        None,
    )


torch.library.register_autograd("rom::faulty_matmul", _matmul_autograd, setup_context=_matmul_setup)
torch.library.register_autograd("rom::faulty_values", _values_autograd, setup_context=_values_setup)
