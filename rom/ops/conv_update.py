"""`causal_conv1d_update`: the convolution's decode step, on a state kept in place."""

from __future__ import annotations

from functools import partial

import torch

from rom import dispatch, native
from rom.ops import _decode, _op
from rom.ops.conv import check_activation, check_weight, refused_width
from rom.reference import conv as reference

OP = "causal_conv1d_update"


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Continues `causal_conv1d` by one token or a few, shifting them into the state.

    Args:
        x: `[batch, dim]` or `[batch, steps, dim]`, float32, bfloat16, float16 or float64.
        conv_state: `[slots, dim, width]`, the last `width` inputs, newest last; overwritten. float32 or x's dtype
            (float64 for float64). Strides are free.
        weight: `[dim, width]`, any floating dtype, read in float32. Widths 2 to 4 run on native kernels.
        bias: `[dim]`, any floating dtype.
        activation: None, "silu" or "swish" (the same).
        state_indices: int32 `[batch]`, the slot of each sequence; negative is padding: its output is 0 and no state
            changes. None: sequence b owns slot b, and slots equals batch. Never read on a GPU's host: there a slot out
            of range gives NaN.

    Returns:
        out like x.

    Raises:
        ValueError: shapes or devices do not fit; a slot is out of range or named twice (read on the CPU only).
        TypeError: a dtype is not supported. RuntimeError: an argument requires a gradient while gradients are on; use
        `causal_conv1d` with initial_state to differentiate.

    Under autocast x is cast to its dtype; weight, bias and state stay as they are.

    >>> state, weight = torch.zeros(1, 1, 2), torch.tensor([[10.0, 1.0]])
    >>> [rom.ops.causal_conv1d_update(torch.tensor([[x]]), state, weight).item() for x in (1.0, 2.0, 3.0)]
    [1.0, 12.0, 23.0]
    """
    x = _op.autocast(x)
    _validate(x, conv_state, weight, bias, activation, state_indices)
    if torch.is_grad_enabled():
        tensors = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
        _decode.refuse_gradients(OP, "causal_conv1d with initial_state", **tensors)
    backend = dispatch.choose(OP, x.device.type, refused_width(weight.shape[1]))
    return torch.ops.rom.causal_conv1d_update.default(
        x, conv_state, weight, bias, activation is not None, state_indices, backend
    )


def _validate(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    state_indices: torch.Tensor | None,
) -> None:
    floating = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
    _op.check_tensors(OP, "x", **floating, state_indices=state_indices)
    for name, tensor in floating.items():
        if tensor is not None:
            _op.check_floating(OP, name, tensor)
    check_activation(OP, activation)
    if x.dim() not in (2, 3):
        _op.fail(OP, "x of shape [batch, dim] or [batch, steps, dim]", str(_op.shape(x)))
    dim = x.shape[-1]
    check_weight(OP, weight, bias, dim)
    if conv_state.dim() != 3 or conv_state.shape[1:] != weight.shape:
        _op.fail(OP, f"conv_state of shape (slots, {dim}, {weight.shape[1]})", str(_op.shape(conv_state)))
    if conv_state.dtype not in (x.dtype, _op.compute_dtype(x.dtype)):
        expected = f"{_op.compute_dtype(x.dtype)} or {x.dtype} (like x)"
        raise TypeError(f"rom.ops.{OP}: expected conv_state of dtype {expected}, got {conv_state.dtype}.")
    _decode.check_slots(OP, conv_state, "conv_state", x.shape[0], state_indices)


def _kernel(
    kernels: _op.Kernels,
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    weight, bias = _decode.readable(weight, bias, activations=x)  # type: ignore[assignment]
    out = native.empty(x.shape, x.dtype, x.device)
    steps, out_steps = (x, out) if x.dim() == 3 else (x.unsqueeze(1), out.unsqueeze(1))
    kernels.call(
        "conv_update",
        x.device,
        silu=int(activation is not None),
        x=_op.unit_stride(steps),
        conv_state=conv_state,
        weight=_op.contiguous(weight),
        bias=_op.contiguous(bias),
        state_indices=_op.contiguous(state_indices),
        out=out_steps,
    )
    return out


_TRITON = "rom.triton_kernels.conv_update"
for _backend in ("cuda", "cpu"):
    dispatch.register(OP, _backend, partial(_kernel, native), kernels=("conv_update",))
dispatch.register(OP, "triton", partial(_kernel, _op.Triton(_TRITON)), module=_TRITON)
dispatch.register(OP, "reference", reference.causal_conv1d_update)


# ------------------------------------------------------------------------------------------------ registration
_op.define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu,"
    " Tensor? state_indices, str backend) -> Tensor"
)


def _run(x, conv_state, weight, bias, silu, state_indices, backend):  # type: ignore[no-untyped-def]
    _decode.check_slot_values(OP, conv_state.shape[0], state_indices)
    run = dispatch.implementation(OP, backend).forward
    out = run(x, conv_state, weight, bias, "silu" if silu else None, state_indices)
    _decode.mark_overwritten(conv_state)
    return out


_op.LIBRARY.impl("causal_conv1d_update", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::causal_conv1d_update")
def _(x, conv_state, weight, bias, silu, state_indices, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)
