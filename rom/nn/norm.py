"""The residual addition and RMSNorm that stand before every block, as a module."""

from __future__ import annotations

import torch
from torch import nn

from rom import ops


class AddRMSNorm(nn.Module):
    """`rom.ops.add_rms_norm` with its weight: `(x, residual) -> (normalised sum, sum)`.

    Without a residual (the first block) the stream begins: in float32 with residual_in_fp32, else in x's dtype.

    >>> y, residual = rom.nn.AddRMSNorm(8)(torch.randn(2, 8), torch.randn(2, 8))
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.eps, self.residual_in_fp32 = eps, residual_in_fp32

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `rom.ops.add_rms_norm`."""
        begins_in_fp32 = residual is None and self.residual_in_fp32 and x.dtype != torch.float64
        return ops.add_rms_norm(x, self.weight, residual, self.eps, torch.float32 if begins_in_fp32 else None)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
