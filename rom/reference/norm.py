"""add + RMSNorm in plain torch: what the operator means."""

from __future__ import annotations

import torch


def add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rom.ops.add_rms_norm`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    kept = residual_dtype or (x.dtype if residual is None else residual.dtype)
    return (total * rstd * weight.to(compute)).to(x.dtype), total.to(kept)
