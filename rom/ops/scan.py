"""`selective_scan`: Mamba's recurrence, the state space model whose step size, B and C depend on the input."""

from __future__ import annotations

import torch

from rom import dispatch
from rom.ops import _op
from rom.reference import scan as reference

OP = "selective_scan"
MAX_STATE = 256  # of the native kernels


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
    of each conjugate pair: y = 2 Re Σ C h) and more than 256 states run on the reference backend.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), eq. 2a and
    algorithm 2, with A discretised exactly and B by Euler's rule, as its code does.

    >>> u = torch.ones(1, 3, 1)
    >>> rom.ops.selective_scan(u, u, A=torch.full((1, 1), -1.0), B=torch.ones(1, 3, 1), C=torch.ones(1, 3, 1)).squeeze()
    tensor([1.0000, 1.3679, 1.5032])
    """
    parameters = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    indices = {"cu_seqlens": cu_seqlens, "row_index": row_index}
    _op.check_tensors(OP, "u", u=u, delta=delta, B=B, C=C, z=z, **parameters, **indices)
    u, delta = _autocast(u), _autocast(delta)
    B, C = (x if x.dim() == 2 else _autocast(x) for x in (B, C))  # constant over time: parameters
    z = None if z is None else _autocast(z)
    _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, out_dtype, row_index)
    return reference.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        initial_state, cu_seqlens, return_final_state, out_dtype, row_index,
    )  # fmt: skip


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """An activation in autocast's dtype; float64 and complex tensors stay."""
    dtype = _op.autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 or x.is_complex() else x.to(dtype)


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
    rows = row_index.numel()
    if _values_known(row_index):
        # Every row exactly once: what the kernels rely on, since two steps writing one row would race.
        hits = torch.bincount(row_index.flatten().clamp(0, rows - 1), minlength=rows)
        if not bool((hits == 1).all()):
            _op.fail(OP, f"row_index to name each of its {rows} rows exactly once", "repeated or outside rows")
    return rows


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
    if _values_known(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != length or values != sorted(values):
            _op.fail(OP, f"cu_seqlens to rise from 0 to the length {length}", str(values))
    return cu_seqlens.shape[0] - 1


def _values_known(tensor: torch.Tensor) -> bool:
    """Whether reading values costs no device synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


dispatch.register(OP, "reference", reference.selective_scan)
