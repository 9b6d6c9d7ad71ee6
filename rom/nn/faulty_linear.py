"""`FaultyLinear`: nn.Linear whose product a fault plan can reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from rom.faults import records
from rom.ops.faults import faulty_matmul


class FaultyLinear(nn.Linear):
    """`nn.Linear` with sites: `rom.ops.faulty_matmul` of its input and weight.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        options: mode, grad, persistence, bounds, nan_to of `rom.ops.faulty_matmul`.

    `arm(sites)` chooses the faults of the calls that follow; `log` has what the last call did, records of dtype
    `rom.faults.LOG`, a row per site. Neither is saved in the state dict: checkpoints are those of `nn.Linear`.

    >>> layer = rom.nn.FaultyLinear(4, 3)
    >>> layer.arm(rom.faults.sites(rom.faults.Target.OUTPUT, rom.faults.flip(1 << 31), sample=0, col=2))
    >>> y = layer(torch.ones(2, 4))
    >>> y[0, 2] == -y[1, 2], layer.log["status"]
    (tensor(True), array([1], dtype=int32))
    """

    sites: torch.Tensor
    written: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.options = options
        self.register_buffer("sites", torch.zeros(0, records.WORDS, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("written", torch.zeros(0, 3, dtype=torch.int32, device=device), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> FaultyLinear:
        """A layer with the same parameters: the very same objects, which keep receiving the gradients."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        for name in ("sites", "written"):
            setattr(layer, name, torch.empty_like(getattr(layer, name), device=linear.weight.device))
        return layer.train(linear.training)

    def arm(self, sites: np.ndarray) -> None:
        """Chooses the faults of the next calls (records of dtype `rom.faults.SITE`); an empty array: none."""
        self.sites = records.to_tensor(sites, self.weight.device)
        self.written = torch.zeros(len(sites), 3, dtype=torch.int32, device=self.weight.device)

    @property
    def log(self) -> np.ndarray:
        """What the last call did to each site."""
        return records.log_records(self.written)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[S, ..., in]` to `[S, ..., out]`; without a batch dimension, `[in]`, it is sample 0."""
        batch = x if x.dim() > 1 else x[None]
        y, log = faulty_matmul(batch, self.weight.mT, self.sites, self.bias, **self.options)
        self.written.copy_(log)
        return y if x.dim() > 1 else y[0]
