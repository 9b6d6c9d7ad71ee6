"""`causal_conv1d`: the short depthwise convolution in front of every selective scan."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rom import dispatch, native
from rom.ops import _op
from rom.reference import conv as reference

OP = "causal_conv1d"
WIDTHS = (2, 3, 4)  # of the native kernels
ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolves every channel with its own short filter over the present and the recent past.

        out_t = act(bias + Σ_k weight[:, k] · x_{t - width + 1 + k})        k = 0 … width - 1

    Args:
        x: `[batch, length, dim]`, float32, bfloat16, float16 or float64, any length, 0 included. Views with contiguous
            channels, such as `in_proj(h).chunk(2, -1)[0]`, are read in place.
        weight: `[dim, width]`, any floating dtype, read in float32; the last tap weighs the present. (This is
            `nn.Conv1d(dim, dim, width, groups=dim).weight.squeeze(1)`.) Widths 2 to 4 run on native kernels, others on
            the slow reference backend.
        bias: `[dim]`, any floating dtype.
        activation: None, "silu" or "swish" (the same).
        initial_state: `[sequences, dim, width]`, any floating dtype: the `width` inputs before each sequence, newest
            last; zeros if None. Only the last width - 1 matter. sequences is batch, or len(cu_seqlens) - 1.
        cu_seqlens: int32 `[sequences + 1]`, packed sequences: batch is 1, sequence i owns the time steps
            cu_seqlens[i] … cu_seqlens[i + 1] - 1 and sees nothing of its neighbours. Empty sequences are fine.
        return_final_state: also returns the last `width` inputs of every sequence (reaching into initial_state where a
            sequence is shorter): what continues it, here or in `causal_conv1d_update`.
        row_index: int32 `[batch, length, K]`. x is then a table of rows `[batch * length * K, dim]` and step t reads
            Σ_k x[row_index[b, t, k]]. Every row belongs to exactly one (b, t, k): the order in which a routed
            projection leaves its rows.

    Returns:
        out `[batch, length, dim]` in x's dtype, or `(out, final_state)` with final_state `[sequences, dim, width]` in
        float32 (float64 for float64 input). Sums are float32 (float64). Every floating argument is differentiable, and
        so is final_state; second derivatives exist under `rom.backend("reference")` only.

    Raises:
        ValueError: shapes, devices or activation do not fit, or the values of cu_seqlens or row_index do not (read on
        the CPU only). TypeError: a dtype is not floating, or that of cu_seqlens or row_index is not int32.

    Under autocast x is cast to its dtype; weight, bias and states stay as they are.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4; the
    state is laid out as in the mamba_ssm package.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    >>> rom.ops.causal_conv1d(x, weight=torch.tensor([[10.0, 1.0]])).flatten()
    tensor([ 1., 12., 23.])
    """
    x = _op.autocast(x)
    _validate(x, weight, bias, activation, initial_state, cu_seqlens, row_index)
    width = weight.shape[1]
    backend = dispatch.choose(OP, x.device.type, refused_width(width))
    if backend == "reference" and not torch.compiler.is_compiling():
        _check_values(x, cu_seqlens, row_index)
        return reference.causal_conv1d(
            x, weight, bias, activation, initial_state, cu_seqlens, return_final_state, row_index
        )
    out, final_state = torch.ops.rom.causal_conv1d(
        x, weight, bias, activation is not None, initial_state, cu_seqlens, return_final_state, row_index, backend
    )
    return (out, final_state) if return_final_state else out


# ------------------------------------------------------------------------------------------------ checks
def _validate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> None:
    parameters = {"weight": weight, "bias": bias, "initial_state": initial_state}
    indices = {"cu_seqlens": cu_seqlens, "row_index": row_index}
    _op.check_tensors(OP, "x", x=x, **parameters, **indices)
    for name, tensor in {"x": x, **parameters}.items():
        if tensor is not None:
            _op.check_floating(OP, name, tensor)
    for name, tensor in indices.items():
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"rom.ops.{OP}: expected {name} of dtype torch.int32, got {tensor.dtype}.")
    check_activation(OP, activation)
    if row_index is None:
        if x.dim() != 3:
            _op.fail(OP, "x of shape [batch, length, dim]", str(_op.shape(x)))
        batch = x.shape[0]
    else:
        if row_index.dim() != 3 or row_index.shape[2] == 0:
            _op.fail(OP, "row_index of shape [batch, length, K] with K > 0", str(_op.shape(row_index)))
        if x.dim() != 2 or x.shape[0] != row_index.numel():
            _op.fail(OP, f"x of shape ({row_index.numel()}, dim), a row per entry of row_index", str(_op.shape(x)))
        batch = row_index.shape[0]
    dim = x.shape[-1]
    check_weight(OP, weight, bias, dim)
    sequences = batch
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            _op.fail(OP, "cu_seqlens of shape (sequences + 1,) with at least one sequence", str(_op.shape(cu_seqlens)))
        if batch != 1:
            _op.fail(OP, "batch 1 with cu_seqlens", f"batch {batch}", "Flatten the batch into one packed sequence.")
        sequences = cu_seqlens.shape[0] - 1
    _op.check_shape(OP, "initial_state", initial_state, (sequences, dim, weight.shape[1]))


def refused_width(width: int) -> tuple[tuple[str, str], ...]:
    """Who cannot run a width, and why: what `dispatch.choose` asks of both conv operators."""
    reason = f"width {width} is not one of {WIDTHS}"
    return () if width in WIDTHS else tuple((backend, reason) for backend in ("cuda", "triton", "cpu"))


def check_activation(op: str, activation: str | None) -> None:
    """The activations both conv operators know."""
    if activation not in ACTIVATIONS:
        _op.fail(op, 'activation None, "silu" or "swish"', repr(activation))


def check_weight(op: str, weight: torch.Tensor, bias: torch.Tensor | None, dim: int) -> None:
    """A filter per channel."""
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        remedy = "nn.Conv1d's weight (dim, 1, width) becomes that by weight.squeeze(1)."
        _op.fail(op, f"weight of shape ({dim}, width)", str(_op.shape(weight)), remedy)
    _op.check_shape(op, "bias", bias, (dim,))


def _check_values(x: torch.Tensor, cu_seqlens: torch.Tensor | None, row_index: torch.Tensor | None) -> None:
    """What the kernels rely on. Read on the CPU only: on a GPU it would wait for the device."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        bounds, length = cu_seqlens.tolist(), x.shape[1] if row_index is None else row_index.shape[1]
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            _op.fail(OP, f"cu_seqlens to rise from 0 to the length {length}", str(bounds))
    if row_index is not None and row_index.device.type == "cpu" and row_index.numel():
        rows = row_index.numel()
        hits = torch.bincount(row_index.flatten().clamp(-1, rows) + 1, minlength=rows + 2)  # outside rows: 0, rows + 1
        if not bool((hits[1:-1] == 1).all()):
            _op.fail(OP, f"row_index to name each of its {rows} rows exactly once", "repeated or outside rows")


def _out_shape(x: torch.Tensor, row_index: torch.Tensor | None) -> tuple[int, int, int]:
    batch, length = (x if row_index is None else row_index).shape[:2]
    return batch, length, x.shape[-1]


def _state_shape(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor | None, row_index: torch.Tensor | None
) -> tuple[int, int, int]:
    sequences = _out_shape(x, row_index)[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, weight.shape[0], weight.shape[1]


# ------------------------------------------------------------------------------------------------ kernels
# `kernels` is rom.native or rom.ops._op.Triton: the same functions, so that one piece of code feeds both.
def _inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> dict[str, Any]:
    """The arguments forward and backward share, as the kernels want them: weight (width, dim), compute dtype."""
    compute = _op.compute_dtype(x.dtype)
    return {
        "silu": int(silu),
        "x": _op.unit_stride(x),
        "weight": weight.t().to(compute).contiguous(),
        "bias": None if bias is None else bias.to(compute).contiguous(),
        "initial_state": None if initial_state is None else initial_state.to(compute).contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "row_index": None if row_index is None else row_index.contiguous(),
    }


def _kernel_forward(
    kernels: _op.Kernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_final_state: bool,
    row_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = native.empty(_out_shape(x, row_index), x.dtype, x.device)
    shape = _state_shape(x, weight, cu_seqlens, row_index) if return_final_state else (0,)
    final_state = native.empty(shape, _op.compute_dtype(x.dtype), x.device)
    arguments = _inputs(x, weight, bias, silu, initial_state, cu_seqlens, row_index)
    arguments["final_state"] = final_state if return_final_state else None
    kernels.call("conv_forward", x.device, out=out, **arguments)
    return out, final_state


def _kernel_backward(
    kernels: _op.Kernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_final: torch.Tensor | None,
) -> reference.Grads:
    compute = _op.compute_dtype(x.dtype)
    arguments = _inputs(x, weight, bias, silu, initial_state, cu_seqlens, row_index)
    grad_x = native.empty(x.shape, x.dtype, x.device)
    grad_weight = native.empty((weight.shape[1], weight.shape[0]), compute, x.device)
    grad_bias = native.empty((weight.shape[0],), compute, x.device)
    grad_initial = native.empty((0,) if initial_state is None else initial_state.shape, compute, x.device)
    arguments |= {
        "grad_out": _op.unit_stride(grad_out),
        "grad_final_state": None if grad_final is None else grad_final.contiguous(),
        "grad_x": grad_x,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "grad_initial_state": None if initial_state is None else grad_initial,
    }
    workspace = kernels.workspace("conv_backward", x.device, **arguments)
    kernels.call("conv_backward", x.device, workspace=workspace, **arguments)
    return grad_x, grad_weight.t().contiguous(), grad_bias, grad_initial


_TRITON = "rom.triton_kernels.conv"
for _backend, _kernels, _names in (
    ("cuda", native, ("conv_forward", "conv_backward")),
    ("triton", _op.Triton(_TRITON), ()),
    ("cpu", native, ("conv_forward", "conv_backward")),
):
    dispatch.register(
        OP,
        _backend,
        partial(_kernel_forward, _kernels),
        partial(_kernel_backward, _kernels),
        kernels=_names,
        module=_TRITON if _backend == "triton" else None,
    )


# ------------------------------------------------------------------------------------------------ reference backend
def _reference_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_final_state: bool,
    row_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    activation = "silu" if silu else None
    out, final_state = reference.causal_conv1d(x, weight, bias, activation, initial_state, cu_seqlens, True, row_index)
    return out, final_state if return_final_state else final_state.new_empty(0)


def _reference_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_final: torch.Tensor | None,
) -> reference.Grads:
    activation = "silu" if silu else None
    grads = reference.causal_conv1d_backward(
        x, weight, bias, activation, initial_state, cu_seqlens, row_index, grad_out, grad_final
    )
    return *grads[:3], grads[3] if initial_state is not None else grads[3].new_empty(0)


dispatch.register(OP, "reference", _reference_forward, _reference_backward)


# ------------------------------------------------------------------------------------------------ registration
_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, "
_op.define(f"causal_conv1d({_ARGUMENTS} bool return_final_state, Tensor? row_index, str backend) -> (Tensor, Tensor)")
_op.define(
    f"causal_conv1d_backward({_ARGUMENTS} Tensor? row_index, Tensor grad_out, Tensor? grad_final, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(x, weight, bias, silu, initial_state, cu_seqlens, return_final_state, row_index, backend):  # type: ignore[no-untyped-def]
    _check_values(x, cu_seqlens, row_index)
    run = dispatch.implementation(OP, backend).forward
    return run(x, weight, bias, silu, initial_state, cu_seqlens, return_final_state, row_index)


def _backward(*arguments):  # type: ignore[no-untyped-def]
    run = dispatch.implementation(OP, arguments[-1]).backward
    assert run is not None
    return run(*arguments[:-1])


_op.LIBRARY.impl("causal_conv1d", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("causal_conv1d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::causal_conv1d")
def _(x, weight, bias, silu, initial_state, cu_seqlens, return_final_state, row_index, backend):  # type: ignore[no-untyped-def]
    out = x.new_empty(_out_shape(x, row_index))
    shape = _state_shape(x, weight, cu_seqlens, row_index) if return_final_state else 0
    return out, x.new_empty(shape, dtype=_op.compute_dtype(x.dtype))


@torch.library.register_fake("rom::causal_conv1d_backward")
def _(x, weight, bias, silu, initial_state, cu_seqlens, row_index, grad_out, grad_final, backend):  # type: ignore[no-untyped-def]
    compute = _op.compute_dtype(x.dtype)
    shape = 0 if initial_state is None else initial_state.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=compute),
        x.new_empty(weight.shape[0], dtype=compute),
        x.new_empty(shape, dtype=compute),
    )


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.silu, initial_state, cu_seqlens, _, row_index, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens, row_index)
    ctx.out_shape, ctx.dtype = output[0].shape, output[0].dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_final):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens, row_index = ctx.saved_tensors
    if grad_out is None:
        grad_out = x.new_zeros(ctx.out_shape)
    grad_x, grad_weight, grad_bias, grad_initial = torch.ops.rom.causal_conv1d_backward(
        x, weight, bias, ctx.silu, initial_state, cu_seqlens, row_index, grad_out, grad_final, ctx.backend
    )
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    grad_initial = None if initial_state is None else grad_initial.to(initial_state.dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias, None, grad_initial, None, None, None, None


torch.library.register_autograd("rom::causal_conv1d", _autograd, setup_context=_setup)
