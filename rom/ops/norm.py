"""`add_rms_norm`: residual addition and RMSNorm in one pass over memory."""

from __future__ import annotations

from functools import partial

import torch

from rom import dispatch, native
from rom.ops import _op
from rom.reference import norm as reference

# grad_x, grad_residual (empty where it equals grad_x), grad_weight
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual stream and normalises: what stands before every block of a language model.

        s = x + residual;   y = s / sqrt(mean(s²) + eps) · weight

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64; the output of the previous block.
        weight: `[D]`, any floating dtype; read in float32.
        residual: `[..., D]` like x, in `residual_dtype`; None at the first block.
        eps: added to the mean square.
        residual_dtype: dtype of the residual stream, x's own (default) or float32.

    Returns:
        `(y, s)`: y in x's dtype, s in the residual's. The sum and the norm are computed in float32 (float64 for
        float64 input); y is normalised from the unrounded sum.

    Raises:
        ValueError: shapes do not match. TypeError: a dtype is not floating or the residual's dtype is another.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4. Under autocast x keeps its dtype.

    >>> y, s = rom.ops.add_rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0)
    >>> y
    tensor([[0.8485, 1.1314]])
    """
    _validate(x, weight, residual, residual_dtype)
    wide = x.shape[-1] > 65536
    refusals = (("triton", "a row of more than 65536 values does not fit its tile"),) if wide else ()
    backend = dispatch.choose("add_rms_norm", x.device.type, refusals)
    if backend == "reference" and not torch.compiler.is_compiling():
        return reference.add_rms_norm(x, weight, residual, eps, residual_dtype)
    kept = residual_dtype or (x.dtype if residual is None else residual.dtype)
    if residual is None:  # the sum is x itself: nothing to write, and the gradients add up in autograd
        out, _, _ = torch.ops.rom.add_rms_norm(x, weight, None, eps, backend)
        return out, x.to(kept)
    out, total, _ = torch.ops.rom.add_rms_norm(x, weight, residual, eps, backend)
    return out, total


def _validate(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, residual_dtype: torch.dtype | None
) -> None:
    op = "add_rms_norm"
    _op.check_tensors(op, "x", x=x, weight=weight, residual=residual)
    _op.check_floating(op, "x", x)
    _op.check_floating(op, "weight", weight)
    if x.dim() == 0:
        _op.fail(op, "x of shape [..., D]", "a scalar")
    _op.check_shape(op, "weight", weight, (x.shape[-1],))
    _op.check_shape(op, "residual", residual, _op.shape(x))
    expected = residual_dtype or (x.dtype if residual is None else residual.dtype)
    if expected not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and expected != torch.float64):
        raise TypeError(f"rom.ops.{op}: expected a residual stream of {x.dtype} (like x) or float32, got {expected}.")
    if residual is not None and residual.dtype != expected:
        raise TypeError(f"rom.ops.{op}: expected residual of dtype {expected} (residual_dtype), got {residual.dtype}.")


# ------------------------------------------------------------------------------------------------ kernels
# `kernels` is rom.native or rom.ops._op.Triton: the same two functions, so that one piece of code feeds both.
def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]).contiguous()


def _kernel_forward(
    kernels: _op.Kernels, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, compute = _rows(x), _op.compute_dtype(x.dtype)
    out = native.empty(rows.shape, x.dtype, x.device)
    rstd = native.empty((rows.shape[0],), compute, x.device)
    total = None if residual is None else native.empty(rows.shape, residual.dtype, x.device)
    kernels.call(
        "norm_forward",
        x.device,
        x=rows,
        residual=None if residual is None else _rows(residual),
        weight=weight.to(compute).contiguous(),
        out=out,
        sum=total,
        rstd=rstd,
        eps=eps,
    )
    return out.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape), rstd


def _kernel_backward(
    kernels: _op.Kernels,
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
) -> Grads:
    compute = _op.compute_dtype(grad_out.dtype)
    rows = _rows(total)
    grad_x = native.empty(rows.shape, grad_out.dtype, total.device)
    grad_residual = None if total.dtype == grad_out.dtype else native.empty(rows.shape, total.dtype, total.device)
    grad_weight = native.empty((rows.shape[1],), compute, total.device)
    arguments = {
        "sum": rows,
        "weight": weight.to(compute).contiguous(),
        "rstd": rstd,
        "grad_out": _rows(grad_out),
        "grad_sum": None if grad_sum is None else _rows(grad_sum),
        "grad_x": grad_x,
        "grad_residual": grad_residual,
        "grad_weight": grad_weight,
    }
    workspace = kernels.workspace("norm_backward", total.device, **arguments)
    kernels.call("norm_backward", total.device, workspace=workspace, **arguments)
    kept = grad_x.new_empty(0) if grad_residual is None else grad_residual.view(total.shape)
    return grad_x.view(total.shape), kept, grad_weight


def _reference_forward(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, total = reference.add_rms_norm(x, weight, residual, eps)
    compute = _op.compute_dtype(x.dtype)
    rstd = torch.rsqrt(total.to(compute).square().mean(-1) + eps).flatten()
    return out, x.new_empty(0) if residual is None else total, rstd


def _reference_backward(
    total: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, grad_out: torch.Tensor, grad_sum: torch.Tensor | None
) -> Grads:
    compute = _op.compute_dtype(grad_out.dtype)
    xhat = total.to(compute) * rstd.view(*total.shape[:-1], 1)
    g = grad_out.to(compute)
    grad_weight = (g * xhat).flatten(0, -2).sum(0)
    g = g * weight.to(compute)
    grad = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.view(*total.shape[:-1], 1)
    if grad_sum is not None:
        grad = grad + grad_sum.to(compute)
    kept = grad.new_empty(0) if total.dtype == grad_out.dtype else grad.to(total.dtype)
    return grad.to(grad_out.dtype), kept, grad_weight


_TRITON = "rom.triton_kernels.norm"
for _backend, _kernels, _names in (
    ("cuda", native, ("norm_forward", "norm_backward")),
    ("triton", _op.Triton(_TRITON), ()),
    ("cpu", native, ("norm_forward", "norm_backward")),
):
    dispatch.register(
        "add_rms_norm",
        _backend,
        partial(_kernel_forward, _kernels),
        partial(_kernel_backward, _kernels),
        kernels=_names,
        module=_TRITON if _backend == "triton" else None,
    )
dispatch.register("add_rms_norm", "reference", _reference_forward, _reference_backward)


# ------------------------------------------------------------------------------------------------ registration
_op.define(
    "add_rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, str backend) -> (Tensor, Tensor, Tensor)"
)
_op.define(
    "add_rms_norm_backward(Tensor total, Tensor weight, Tensor rstd, Tensor grad_out, Tensor? grad_sum, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return dispatch.implementation("add_rms_norm", backend).forward(x, weight, residual, eps)


def _backward(
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    backend: str,
) -> Grads:
    run = dispatch.implementation("add_rms_norm", backend).backward
    assert run is not None
    return run(total, weight, rstd, grad_out, grad_sum)


_op.LIBRARY.impl("add_rms_norm", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("add_rms_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::add_rms_norm")
def _(x, weight, residual, eps, backend):  # type: ignore[no-untyped-def]
    compute = _op.compute_dtype(x.dtype)
    rstd = x.new_empty(x.numel() // x.shape[-1] if x.shape[-1] else 0, dtype=compute)
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total, rstd


@torch.library.register_fake("rom::add_rms_norm_backward")
def _(total, weight, rstd, grad_out, grad_sum, backend):  # type: ignore[no-untyped-def]
    compute = _op.compute_dtype(grad_out.dtype)
    kept = total.new_empty(0 if total.dtype == grad_out.dtype else total.shape)
    return grad_out.new_empty(total.shape), kept, grad_out.new_empty(total.shape[-1], dtype=compute)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, residual, _, ctx.backend = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.has_residual, ctx.dtype = residual is not None, x.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_sum, _):  # type: ignore[no-untyped-def]
    total, weight, rstd = ctx.saved_tensors
    if grad_out is None:
        grad_out = total.new_zeros(total.shape, dtype=ctx.dtype)
    grad_sum = grad_sum if ctx.has_residual else None
    grad, kept, grad_weight = torch.ops.rom.add_rms_norm_backward(total, weight, rstd, grad_out, grad_sum, ctx.backend)
    grad_residual = None if not ctx.has_residual else grad if total.dtype == grad.dtype else kept
    return grad, grad_weight.to(weight.dtype), grad_residual, None, None


torch.library.register_autograd("rom::add_rms_norm", _autograd, setup_context=_setup)
