"""`selective_scan`: Mamba's recurrence, the state space model whose step size, B and C depend on the input."""

from __future__ import annotations

from functools import partial

import torch

from rom import dispatch, native
from rom.ops import _op
from rom.reference import scan as reference

OP = "selective_scan"
MAX_STATE = 256  # of the native kernels
BACKWARD_SHARED = 129 << 10  # bytes per block of csrc/cuda/scan_backward.cu: GPUs that have less use Triton
TILE = 32  # ROM_SCAN_TILE: time steps between two state checkpoints

# grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_delta_bias, grad_initial_state; empty where not asked
Grads = tuple[torch.Tensor, ...]


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    out_dtype: torch.dtype | None = None,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs the selective state space model over time, one independent recurrence per channel d and state n.

        δ_t = softplus(delta_t + delta_bias)                  (softplus and bias optional)
        h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t B_t u_t              h_0 = initial_state or 0
        y_t = Σ_n C_t h_t + D u_t;     out_t = y_t · SiLU(z_t)

    Args:
        u: `[batch, length, dim]`, the input; float32, bfloat16, float16 or float64. Any length, 0 included.
        delta: like u, the step sizes (before bias and softplus).
        A: `[dim, state]`, any floating dtype (complex: see below); its entries are negative in every stable model.
        B, C: `[batch, length, state]`, or `[batch, length, groups, state]` (each group serves dim / groups neighbouring
            channels), in u's dtype; or constant over time, `[dim, state]`, any floating dtype.
        D: `[dim]`, any floating dtype; the skip connection.
        z: like u, the gate.
        delta_bias: `[dim]`, any floating dtype.
        delta_softplus: applies softplus to delta.
        initial_state: `[sequences, dim, state]`, any floating dtype; sequences is batch, or len(cu_seqlens) - 1.
        cu_seqlens: int32 `[sequences + 1]`, packed sequences: batch is 1, sequence i owns the time steps
            cu_seqlens[i] ... cu_seqlens[i + 1] - 1, and the state starts afresh at each. Empty sequences are fine.
        return_final_state: also returns the states after each sequence's last step.
        out_dtype: dtype of out, u's own (default) or float32.
        row_index: int32 `[batch, length, K]` or `[batch * length, K]`. z and out are then tables of rows
            `[batch * length * K, dim]`: step t reads Σ_k z[row_index[t, k]] and writes its output to each of those.
            Every row belongs to exactly one (t, k): the order in which a routed projection keeps its rows.

    Returns:
        out, or `(out, final_state)` with final_state `[sequences, dim, state]`. States and accumulation are float32
        (float64 for float64 input). Everything is differentiable: every floating argument, and through final_state.
        Second derivatives exist under `rom.backend("reference")` only.

    Raises:
        ValueError: shapes, devices, cu_seqlens or row_index do not fit (the values of the latter two are checked on the
        CPU only). TypeError: a dtype is not supported, or u, delta, z, B and C differ in dtype outside autocast.

    Under autocast u, delta, z, B and C are cast to its dtype; parameters and states stay in float32. A complex A (one
    of each conjugate pair: y = 2 Re Σ C h) and more than 256 states run on the reference backend. On a GPU
    float64 runs on Triton if gradients are wanted.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), eq. 2a and
    algorithm 2, with A discretised exactly and B by Euler's rule, as its code does.

    >>> u = torch.ones(1, 3, 1)
    >>> rom.ops.selective_scan(u, u, A=torch.full((1, 1), -1.0), B=torch.ones(1, 3, 1), C=torch.ones(1, 3, 1)).squeeze()
    tensor([1.0000, 1.3679, 1.5032])
    """
    parameters = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    indices = {"cu_seqlens": cu_seqlens, "row_index": row_index}
    _op.check_tensors(OP, "u", u=u, delta=delta, B=B, C=C, z=z, **parameters, **indices)
    u, delta, z = _op.autocast(u), _op.autocast(delta), _op.autocast(z)
    B, C = (x if x.dim() == 2 else _op.autocast(x) for x in (B, C))  # constant over time: parameters
    _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, out_dtype, row_index)
    differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    backend = dispatch.choose(OP, u.device.type, _refusals(u, A, B, C, save))
    if backend == "reference":  # under torch.compile, too: the loop over time is unrolled into the graph
        if not torch.compiler.is_compiling():
            _check_values(u, cu_seqlens, row_index)
        return reference.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            initial_state,
            cu_seqlens,
            return_final_state,
            out_dtype,
            row_index,
        )
    out, final_state, _ = torch.ops.rom.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        cu_seqlens,
        row_index,
        out_dtype or u.dtype,
        save,
        backend,
    )
    return (out, final_state) if return_final_state else out


def _refusals(
    u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, save: bool
) -> tuple[tuple[str, str], ...]:
    """Why the native kernels cannot take this call."""
    reason = ""
    if A.is_complex() or B.is_complex() or C.is_complex():
        reason = "complex A, B or C run on the reference backend"
    elif A.shape[1] > MAX_STATE:
        reason = f"{A.shape[1]} states per channel, more than {MAX_STATE}"
    elif u.dtype == torch.float64 and save:  # its backward pass fills the registers with 32-bit numbers
        return (("cuda", "no gradients of float64"),)
    return tuple((backend, reason) for backend in ("cuda", "triton", "cpu") if reason)


def _validate(
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
    out_dtype: torch.dtype | None,
    row_index: torch.Tensor | None,
) -> None:
    _op.check_floating(OP, "u", u)
    activations: dict[str, torch.Tensor | None] = {"delta": delta, "z": z}
    parameters = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    for name, tensor in (("B", B), ("C", C)):
        (parameters if tensor.dim() == 2 else activations)[name] = tensor
    for name, value in parameters.items():
        if value is not None and not value.is_complex():
            _op.check_floating(OP, name, value)
    _op.check_same_dtype(OP, "u", u=u, **{k: x for k, x in activations.items() if x is not None and not x.is_complex()})
    if out_dtype not in (None, u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32):
        raise TypeError(f"rom.ops.{OP}: expected out_dtype {u.dtype} (like u) or torch.float32, got {out_dtype}.")
    if u.dim() != 3:
        _op.fail(OP, "u of shape [batch, length, dim]", str(_op.shape(u)))
    batch, length, dim = u.shape
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        _op.fail(OP, f"A of shape ({dim}, state)", str(_op.shape(A)))
    state = A.shape[1]
    _op.check_shape(OP, "delta", delta, (batch, length, dim))
    for name, x in (("B", B), ("C", C)):
        if x.dim() == 4 and (x.shape[2] == 0 or dim % x.shape[2]):
            _op.fail(OP, f"a number of groups in {name} that divides dim {dim}", str(x.shape[2]))
        grouped = (batch, length, x.shape[2] if x.dim() == 4 else 1, state)
        _op.check_shape(OP, name, x, (batch, length, state), grouped, (dim, state))
    if B.dim() == C.dim() == 4 and B.shape[2] != C.shape[2]:
        _op.fail(OP, f"C with {B.shape[2]} groups like B", str(C.shape[2]))
    _op.check_shape(OP, "D", D, (dim,))
    _op.check_shape(OP, "delta_bias", delta_bias, (dim,))
    rows = _validate_row_index(row_index, batch, length)
    _op.check_shape(OP, "z", z, (batch, length, dim) if rows is None else (rows, dim))
    sequences = _validate_cu_seqlens(cu_seqlens, batch, length)
    _op.check_shape(OP, "initial_state", initial_state, (sequences, dim, state))


def _validate_row_index(row_index: torch.Tensor | None, batch: int, length: int) -> int | None:
    """The number of rows of z and out, None without row_index."""
    if row_index is None:
        return None
    if row_index.dtype != torch.int32:
        raise TypeError(f"rom.ops.{OP}: expected row_index of dtype int32, got {row_index.dtype}.")
    k = row_index.shape[-1] if row_index.dim() in (2, 3) else 0
    if k == 0:
        _op.fail(OP, "row_index of shape (batch, length, K > 0) or (batch * length, K > 0)", str(_op.shape(row_index)))
    _op.check_shape(OP, "row_index", row_index, (batch, length, k), (batch * length, k))
    return row_index.numel()


def _validate_cu_seqlens(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> int:
    """The number of sequences."""
    if cu_seqlens is None:
        return batch
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"rom.ops.{OP}: expected cu_seqlens of dtype int32, got {cu_seqlens.dtype}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        _op.fail(OP, "cu_seqlens of shape (sequences + 1,) with at least one sequence", str(_op.shape(cu_seqlens)))
    if batch != 1:
        _op.fail(OP, "batch 1 with cu_seqlens", f"batch {batch}", "Flatten the batch into one packed sequence.")
    return cu_seqlens.shape[0] - 1


def _check_values(u: torch.Tensor, cu_seqlens: torch.Tensor | None, row_index: torch.Tensor | None) -> None:
    """What shapes do not tell; on the CPU only, where reading values costs no synchronisation."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        values, length = cu_seqlens.tolist(), u.shape[1]
        if values[0] != 0 or values[-1] != length or values != sorted(values):
            _op.fail(OP, f"cu_seqlens to rise from 0 to the length {length}", str(values))
    if row_index is not None and row_index.device.type == "cpu" and row_index.numel() > 0:
        rows = row_index.numel()  # two steps that write one row would race, a row nobody writes would be undefined
        inside = bool((row_index >= 0).all() and (row_index < rows).all())
        if not inside or not bool((torch.bincount(row_index.flatten(), minlength=rows) == 1).all()):
            _op.fail(OP, f"row_index to name each of its {rows} rows exactly once", "repeated or outside rows")


# ------------------------------------------------------------------------------------------------ kernels
# `kernels` is rom.native or rom.ops._op.Triton: the same functions, so that one piece of code feeds both.
def _kernel_inputs(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> dict[str, torch.Tensor | int | None]:
    """The arguments forward and backward share, as csrc/include/rom/scan.h wants them."""
    compute = _op.compute_dtype(u.dtype)

    def parameter(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(compute).contiguous()

    def coefficient(x: torch.Tensor) -> torch.Tensor | None:
        return parameter(x) if x.dim() == 2 else _op.unit_stride(x.unsqueeze(2) if x.dim() == 3 else x)

    return {
        "delta_softplus": int(delta_softplus),
        "u": _op.unit_stride(u),
        "delta": _op.unit_stride(delta),
        "A": parameter(A),
        "B": coefficient(B),
        "C": coefficient(C),
        "D": parameter(D),
        "z": _op.unit_stride(z),
        "delta_bias": parameter(delta_bias),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "row_index": None if row_index is None else row_index.flatten(0, -2).contiguous(),
    }


def _output_shape(u: torch.Tensor, row_index: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(u.shape) if row_index is None else (row_index.numel(), u.shape[2])


def _state_shape(u: torch.Tensor, A: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, ...]:
    return (u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape)


def _checkpoint_shape(
    u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[int, int, int]:
    """Room for the states at every TILE steps, in the kernels' own layout: padded to 16 channels and 4 states."""
    batch, length, dim = u.shape
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    slots = batch * -(-length // TILE) if cu_seqlens is None else length // TILE + cu_seqlens.shape[0] - 1
    return slots, groups * (-(-(dim // groups) // 16) * 16), -(-A.shape[1] // 4) * 4


def _kernel_forward(
    kernels: _op.Kernels,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_values(u, cu_seqlens, row_index)
    compute = _op.compute_dtype(u.dtype)
    out = native.empty(_output_shape(u, row_index), out_dtype, u.device)
    final_state = native.empty(_state_shape(u, A, cu_seqlens), compute, u.device)
    shape = _checkpoint_shape(u, A, B, C, cu_seqlens) if save else (0, 0, 0)
    checkpoints = native.empty(shape, compute, u.device)
    arguments = {
        **_kernel_inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, row_index),
        "initial_state": None if initial_state is None else initial_state.to(compute).contiguous(),
        "out": out,
        "final_state": final_state,
        "checkpoints": checkpoints if save else None,
    }
    workspace = kernels.workspace("scan_forward", u.device, **arguments)
    kernels.call("scan_forward", u.device, workspace=workspace, **arguments)
    return out, final_state, checkpoints


def _grad_shapes(
    u: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor | None,
    parameters: tuple[bool, bool, bool],
    states: tuple[int, ...],
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every gradient, in the order of Grads; `parameters`: D, delta_bias, initial_state wanted."""
    compute, none = _op.compute_dtype(u.dtype), (0,)
    has_D, has_bias, has_initial = parameters
    return [
        (tuple(u.shape), u.dtype),
        (tuple(u.shape), u.dtype),
        (tuple(A.shape), compute),
        (tuple(B.shape), compute if B.dim() == 2 else u.dtype),
        (tuple(C.shape), compute if C.dim() == 2 else u.dtype),
        (A.shape[:1] if has_D else none, compute),
        (none if z is None else tuple(z.shape), u.dtype),
        (A.shape[:1] if has_bias else none, compute),
        (states if has_initial else none, compute),
    ]


def _kernel_backward(
    kernels: _op.Kernels,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    checkpoints: torch.Tensor,
    grad_out: torch.Tensor,
    grad_final_state: torch.Tensor | None,
    grad_initial_state: bool,
) -> Grads:
    wanted = (D is not None, delta_bias is not None, grad_initial_state)
    shapes = _grad_shapes(u, A, B, C, z, wanted, _state_shape(u, A, cu_seqlens))
    grads = [native.empty(shape, dtype, u.device) for shape, dtype in shapes]
    du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = grads
    arguments = {
        **_kernel_inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, row_index),
        "checkpoints": checkpoints,
        "grad_out": _op.unit_stride(grad_out),
        "grad_final_state": None if grad_final_state is None else grad_final_state.contiguous(),
        "grad_u": du,
        "grad_delta": ddelta,
        "grad_A": dA,
        "grad_B": dB.unsqueeze(2) if dB.dim() == 3 else dB,
        "grad_C": dC.unsqueeze(2) if dC.dim() == 3 else dC,
        "grad_D": dD if D is not None else None,
        "grad_z": dz if z is not None else None,
        "grad_delta_bias": dbias if delta_bias is not None else None,
        "grad_initial_state": dstate if grad_initial_state else None,
    }
    workspace = kernels.workspace("scan_backward", u.device, **arguments)
    kernels.call("scan_backward", u.device, workspace=workspace, **arguments)
    return tuple(grads)


_NATIVE = ("scan_forward", "scan_backward")
for _backend, _shared in (("cpu", 0), ("cuda", BACKWARD_SHARED)):
    dispatch.register(
        OP,
        _backend,
        partial(_kernel_forward, native),
        partial(_kernel_backward, native),
        kernels=_NATIVE,
        shared_bytes=_shared,
    )
_TRITON = _op.Triton("rom.triton_kernels.scan")
dispatch.register(
    OP, "triton", partial(_kernel_forward, _TRITON), partial(_kernel_backward, _TRITON), module=_TRITON.module
)
dispatch.register(OP, "reference", reference.selective_scan)


# ------------------------------------------------------------------------------------------------ registration
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_op.define(
    f"selective_scan({_INPUTS}, bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens, Tensor? row_index,"
    " ScalarType out_dtype, bool save, str backend) -> (Tensor, Tensor, Tensor)"
)
_op.define(
    f"selective_scan_backward({_INPUTS}, bool delta_softplus, Tensor? cu_seqlens, Tensor? row_index,"
    " Tensor checkpoints, Tensor grad_out, Tensor? grad_final_state, bool grad_initial_state, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*arguments):  # type: ignore[no-untyped-def]
    *inputs, backend = arguments
    return dispatch.implementation(OP, backend).forward(*inputs)


def _backward(*arguments):  # type: ignore[no-untyped-def]
    *inputs, backend = arguments
    run = dispatch.implementation(OP, backend).backward
    assert run is not None
    return run(*inputs)


_op.LIBRARY.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::selective_scan")
def _(u, delta, A, B, C, D, z, bias, softplus, initial_state, cu_seqlens, row_index, out_dtype, save, backend):  # type: ignore[no-untyped-def]
    compute = _op.compute_dtype(u.dtype)
    shape = _checkpoint_shape(u, A, B, C, cu_seqlens) if save else (0, 0, 0)
    return (
        u.new_empty(_output_shape(u, row_index), dtype=out_dtype),
        u.new_empty(_state_shape(u, A, cu_seqlens), dtype=compute),
        u.new_empty(shape, dtype=compute),
    )


@torch.library.register_fake("rom::selective_scan_backward")
def _(u, delta, A, B, C, D, z, bias, softplus, cu_seqlens, rows, checkpoints, grad_out, grad_state, initial, backend):  # type: ignore[no-untyped-def]
    wanted = (D is not None, bias is not None, initial)
    shapes = _grad_shapes(u, A, B, C, z, wanted, _state_shape(u, A, cu_seqlens))
    return tuple(u.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.softplus, initial_state, cu_seqlens, row_index, ctx.out_dtype, ctx.saved, ctx.backend = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, row_index, output[2])
    ctx.dtypes = [None if t is None else t.dtype for t in (*tensors, initial_state)]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_final_state, _):  # type: ignore[no-untyped-def]
    if not ctx.saved:
        raise RuntimeError(f"rom.ops.{OP}: expected save=True in a call that is differentiated, got save=False.")
    *tensors, cu_seqlens, row_index, checkpoints = ctx.saved_tensors
    if grad_out is None:
        grad_out = checkpoints.new_zeros(_output_shape(tensors[0], row_index), dtype=ctx.out_dtype)
    grads = torch.ops.rom.selective_scan_backward(
        *tensors,
        ctx.softplus,
        cu_seqlens,
        row_index,
        checkpoints,
        grad_out,
        grad_final_state,
        ctx.needs_input_grad[9],
        ctx.backend,
    )
    *grads, grad_initial = (None if d is None else g.to(d) for g, d in zip(grads, ctx.dtypes))
    return *grads, None, grad_initial if ctx.needs_input_grad[9] else None, None, None, None, None, None


def _no_second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        f"rom.ops.{OP}: the {ctx.backend} backend has no second derivative. Run the forward pass under "
        "`with rom.backend('reference'):`, which is differentiable any number of times."
    )


def _setup_second(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.backend = inputs[-1]


torch.library.register_autograd("rom::selective_scan", _autograd, setup_context=_setup)
torch.library.register_autograd("rom::selective_scan_backward", _no_second_derivative, setup_context=_setup_second)
