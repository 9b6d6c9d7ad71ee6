"""`selective_scan_fn` and `mamba_inner_fn` with the original's arguments: tensors are (batch, dim, length)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rom import ops

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Result:
    """`rom.ops.selective_scan` for (batch, dim, length); differentiable, and so is the last state.

    Args:
        u, delta, z: `[batch, dim, length]`.
        A: `[dim, state]`, real or complex.
        B, C: `[batch, state, length]`, `[batch, groups, state, length]` or `[dim, state]`; for a complex A the ones
            that depend on time hold real and imaginary parts in turn along the length, `2 · length` in all.
        D, delta_bias: `[dim]`.

    Returns:
        `[batch, dim, length]` in u's dtype, or `(out, last_state)` with last_state `[batch, dim, state]` in float32.
    """
    out = ops.selective_scan(
        u.transpose(1, 2),
        delta.to(u.dtype).transpose(1, 2),
        A,
        _coefficient(B, A, u.dtype),
        _coefficient(C, A, u.dtype),
        D,
        None if z is None else z.to(u.dtype).transpose(1, 2),
        delta_bias,
        delta_softplus,
        return_final_state=return_last_state,
    )
    if isinstance(out, tuple):
        return out[0].transpose(1, 2), out[1]
    return out.transpose(1, 2)


selective_scan_ref = selective_scan_fn  # the original's slow twin: same arguments, same results


def _coefficient(x: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B or C as `rom.ops.selective_scan` takes it."""
    if x.dim() == 2:
        return x
    if A.is_complex() and not x.is_complex():
        x = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    x = x if x.is_complex() else x.to(dtype)
    return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """A Mamba block between its input projection and its result: convolution, x_proj, dt_proj, scan, gate, out_proj.

    Args:
        xz: `[batch, 2 · dim, length]`. conv1d_weight: `[dim, 1, width]`. x_proj_weight: `[rank + 2 · state, dim]`
            (4 · state for a complex A: real and imaginary parts in turn).
        delta_proj_weight: `[dim, rank]`. out_proj_weight: `[d_model, dim]`. A, D, delta_bias: as `selective_scan_fn`.
        B, C: as `selective_scan_fn`, instead of those of x_proj (which then makes no columns for them).
        B_proj_bias, C_proj_bias: `[state]`, added to the columns of x_proj.
        b_rms_weight, c_rms_weight, dt_rms_weight: RMSNorm over those columns with b_c_dt_rms_eps.
        checkpoint_lvl: taken, without effect: what is recomputed is the operators' business.

    Returns:
        `[batch, length, d_model]`.
    """
    x, z = xz.transpose(1, 2).chunk(2, -1)
    rank, state = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    assert isinstance(u, torch.Tensor)
    columns = F.linear(u, x_proj_weight.to(u.dtype))
    dt = _normalised(columns[..., :rank], dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _paired(_shifted(columns[..., rank : rank + state], B_proj_bias, b_rms_weight, b_c_dt_rms_eps), A)
    else:
        B = _coefficient(B, A, u.dtype)
    if C is None:
        C = _paired(_shifted(columns[..., -state:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps), A)
    else:
        C = _coefficient(C, A, u.dtype)
    delta = F.linear(dt, delta_proj_weight.to(dt.dtype))
    y = ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, torch.Tensor)
    bias = None if out_proj_bias is None else out_proj_bias.to(y.dtype)
    return F.linear(y, out_proj_weight.to(y.dtype), bias)


mamba_inner_ref = mamba_inner_fn


def _paired(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Columns as they are, or for a complex A two neighbours as one complex number."""
    return torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2))) if A.is_complex() else x


def _shifted(x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return _normalised(x if bias is None else x + bias.to(x.dtype), weight, eps)


def _normalised(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else ops.add_rms_norm(x, weight, eps=eps)[0]
