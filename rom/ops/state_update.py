"""`selective_state_update`: the selective scan's decode step, on a state kept in place."""

from __future__ import annotations

from functools import partial

import torch

from rom import dispatch, native
from rom.ops import _decode, _op
from rom.reference import state_update as reference

OP = "selective_state_update"


def selective_state_update(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Continues `selective_scan` by one token or a few, overwriting the state with the one after them.

        δ = softplus(delta + delta_bias)                      (softplus and bias optional)
        state ← exp(δ A) ⊙ state + δ B u;     out = (Σ_n C state + D u) · SiLU(z)

    Args:
        state: `[slots, dim, state]`, float32 (float64 for float64 input), overwritten. The last dimension is
            contiguous, other strides are free.
        u: `[batch, dim]` or `[batch, steps, dim]`, float32, bfloat16, float16 or float64.
        delta: like u, the step sizes (before bias and softplus).
        A: `[dim, state]`, real, any floating dtype.
        B, C: `[batch, state]` or `[batch, groups, state]` for u of two dimensions, `[batch, steps, state]` or
            `[batch, steps, groups, state]` for three (each group serves dim / groups neighbouring channels); or
            constant over time, `[dim, state]`. (For u of two dimensions and batch = dim, `[batch, state]` is meant.)
            Any floating dtype.
        D: `[dim]`, any floating dtype; the skip connection.
        z: like u, the gate.
        delta_bias: `[dim]`, any floating dtype.
        delta_softplus: applies softplus to delta.
        state_indices: int32 `[batch]`, the slot of each sequence; negative is padding: its output is 0 and no state
            changes. None: sequence b owns slot b, and slots equals batch. Never read on a GPU's host: there a slot out
            of range gives NaN.

    Returns:
        out like u. Everything is computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes, strides or devices do not fit; a slot is out of range or named twice (read on the CPU only).
        TypeError: a dtype is not supported. RuntimeError: an argument requires a gradient while gradients are on; use
        `selective_scan` with initial_state to differentiate.

    Under autocast u, delta, z, and B and C that depend on the token are cast to its dtype; parameters and state stay.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), eq. 2a.

    >>> state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
    >>> [round(rom.ops.selective_state_update(state, one, one, -one, one, one).item(), 4) for _ in range(3)]
    [1.0, 1.3679, 1.5032]
    """
    if isinstance(u, torch.Tensor) and _op.autocast_dtype(u.device.type) is not None:
        u, delta, z = _op.autocast(u), _op.autocast(delta), _op.autocast(z)
        B, C = (t if _constant(t, u) else _op.autocast(t) for t in (B, C))
    _validate(state, u, delta, A, B, C, D, z, delta_bias, state_indices)
    if torch.is_grad_enabled():
        tensors = {"state": state, "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
        _decode.refuse_gradients(OP, "selective_scan with initial_state", **tensors, delta_bias=delta_bias)
    backend = dispatch.choose(OP, u.device.type)
    return torch.ops.rom.selective_state_update.default(
        state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices, backend
    )


def _constant(coefficients: torch.Tensor, u: torch.Tensor) -> bool:
    """Whether B or C is constant over time, a parameter."""
    return coefficients.dim() == 2 and (u.dim() == 3 or coefficients.shape[0] != u.shape[0])


def _validate(
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    state_indices: torch.Tensor | None,
) -> None:
    floating = {
        "u": u,
        "state": state,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
    }
    _op.check_tensors(OP, "u", **floating, state_indices=state_indices)
    for name, tensor in floating.items():
        if tensor is not None:
            _op.check_floating(OP, name, tensor)
    _op.check_same_dtype(OP, "u", u=u, delta=delta, z=z)
    if state.dtype != _op.compute_dtype(u.dtype):
        raise TypeError(f"rom.ops.{OP}: expected state of dtype {_op.compute_dtype(u.dtype)}, got {state.dtype}.")
    if u.dim() not in (2, 3):
        _op.fail(OP, "u of shape [batch, dim] or [batch, steps, dim]", str(_op.shape(u)))
    batch, dim = u.shape[0], u.shape[-1]
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        _op.fail(OP, f"A of shape ({dim}, state)", str(_op.shape(A)))
    states = A.shape[1]
    for name, tensor in (("delta", delta), ("z", z)):
        _op.check_shape(OP, name, tensor, _op.shape(u))
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        _op.check_shape(OP, name, tensor, (dim,))
    lead = _op.shape(u)[:-1]
    for name, tensor in (("B", B), ("C", C)):
        if tensor.shape == (*lead, states):
            continue
        groups = tensor.shape[-2] if tensor.dim() == u.dim() + 1 else 1
        _op.check_shape(OP, name, tensor, (*lead, states), (*lead, groups, states), (dim, states))
        if groups == 0 or dim % groups:
            _op.fail(OP, f"a number of groups in {name} that divides dim {dim}", str(groups))
    if state.dim() != 3 or state.shape[1:] != A.shape:
        _op.fail(OP, f"state of shape (slots, {dim}, {states})", str(_op.shape(state)))
    if states > 1 and state.stride(2) != 1:
        remedy = "A copy would not be updated: keep the state contiguous in its last dimension."
        _op.fail(OP, "state with stride 1 in its last dimension", f"strides {state.stride()}", remedy)
    _decode.check_slots(OP, state, "state", batch, state_indices)


# `kernels` is rom.native or rom.ops._op.Triton: the same function, so that one piece of code feeds both.
def _kernel(
    kernels: _op.Kernels,
    state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    batch, dim, rank = u.shape[0], u.shape[-1], u.dim()
    length = u.shape[1] if rank == 3 else 1

    def steps(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return _op.unit_stride(tensor if rank == 3 or tensor is None else tensor.unsqueeze(1))

    def by_group(tensor: torch.Tensor | None) -> torch.Tensor:
        return reference.by_group(_op.unit_stride(tensor), batch, length, dim, rank)  # type: ignore[arg-type]

    coefficients = _decode.readable(B, C, activations=u)
    if B.dtype != C.dtype:  # the kernels read both in one dtype
        coefficients = [t.to(state.dtype) for t in (B, C)]
    D, delta_bias = _decode.readable(D, delta_bias, activations=u)
    out = native.empty(u.shape, u.dtype, u.device)
    kernels.call(
        "state_update",
        u.device,
        state=state,
        u=steps(u),
        delta=steps(delta),
        A=_op.contiguous(A if A.dtype == state.dtype else A.to(state.dtype)),
        B=by_group(coefficients[0]),
        C=by_group(coefficients[1]),
        D=_op.contiguous(D),
        z=steps(z),
        delta_bias=_op.contiguous(delta_bias),
        delta_softplus=int(delta_softplus),
        state_indices=_op.contiguous(state_indices),
        out=steps(out),
    )
    return out


for _backend in ("cpu", "cuda"):
    dispatch.register(OP, _backend, partial(_kernel, native), kernels=("state_update",))
_TRITON = _op.Triton("rom.triton_kernels.state_update")
dispatch.register(OP, "triton", partial(_kernel, _TRITON), module=_TRITON.module)
dispatch.register(OP, "reference", reference.selective_state_update)


# ------------------------------------------------------------------------------------------------ registration
_op.define(
    "selective_state_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? state_indices, str backend) -> Tensor"
)


def _run(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices, backend):  # type: ignore[no-untyped-def]
    _decode.check_slot_values(OP, state.shape[0], state_indices)
    run = dispatch.implementation(OP, backend).forward
    out = run(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices)
    _decode.mark_overwritten(state)
    return out


_op.LIBRARY.impl("selective_state_update", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::selective_state_update")
def _(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices, backend):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape)
