"""`RMSNorm`, `rms_norm_fn` and `layer_norm_fn` with the original's arguments, for what Mamba models ask of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rom import ops

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Result:
    """The norm of x + residual; with prenorm also the sum, in float32 with residual_in_fp32 (or residual's dtype)."""
    dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    if is_rms_norm and bias is None:
        y, total = ops.add_rms_norm(x, weight, residual, eps, dtype if residual is None else None)
    else:
        total = (x if residual is None else x + residual).to(dtype)
        wide = total.float()
        y = F.rms_norm(wide, weight.shape, weight.float(), eps) if is_rms_norm else F.layer_norm(
            wide, weight.shape, weight.float(), None if bias is None else bias.float(), eps
        )  # fmt: skip
        y = (y + bias.float() if is_rms_norm and bias is not None else y).to(x.dtype)
    return (y, total) if prenorm else y


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Result:
    """`layer_norm_fn` without the mean."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


class RMSNorm(nn.Module):
    """RMSNorm with an optional residual; `weight`, and `bias` None, as the original's."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Result:
        """See `rms_norm_fn`."""
        return rms_norm_fn(x, self.weight, None, residual, self.eps, prenorm, residual_in_fp32)


def apply_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor | None, prenorm: bool, residual_in_fp32: bool) -> Any:
    """`layer_norm_fn` with the weights of a module, an `RMSNorm` or `nn.LayerNorm`."""
    rms = isinstance(norm, RMSNorm)
    return layer_norm_fn(x, norm.weight, norm.bias, residual, norm.eps, prenorm, residual_in_fp32, rms)
