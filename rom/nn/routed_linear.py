"""`RoutedLinear`: nn.Linear with one weight matrix per expert."""

from __future__ import annotations

import math

import torch
from torch import nn

from rom.ops.routed_linear import routed_linear
from rom.ops.routing import Routing


class RoutedLinear(nn.Module):
    """Linear layer whose rows go to the experts a `rom.Routing` names; see `rom.ops.routed_linear`.

    Args:
        in_features, out_features: width of a row before and after.
        num_experts: E ≥ 1.
        bias: one bias vector per expert.

    Parameters: weight `[E, out, in]` and bias `[E, out]`, each expert initialised like `nn.Linear`. With one expert
    there is no expert axis: the parameters are those of `nn.Linear`, and so is the result.

    Raises:
        ValueError: a size is below 1.

    >>> layer = rom.nn.RoutedLinear(8, 16, num_experts=4)
    >>> routing = rom.ops.route(torch.randn(5, 4), top_k=2)
    >>> layer(torch.randn(5, 8), routing, weighted=True).shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"rom.nn.RoutedLinear: expected {name} of at least 1, got {size}.")
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        experts = () if num_experts == 1 else (num_experts,)
        self.weight = nn.Parameter(torch.empty(*experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ±1/√in_features: what nn.Linear draws (kaiming_uniform, a = √5), for every expert."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: torch.Tensor,
        routing: Routing,
        weighted: bool = False,
        rows_in: str = "token",
        rows_out: str = "token",
    ) -> torch.Tensor:
        """x `[T, in]` (or `[T·K, in]` in expert order) to `[T, out]` (or `[T·K, out]`)."""
        bias = None if self.bias is None else self.bias.view(self.num_experts, -1)
        weight = self.weight.view(self.num_experts, self.out_features, self.in_features)
        return routed_linear(x, weight, routing, bias, weighted, rows_in, rows_out)

    def extra_repr(self) -> str:
        """The sizes, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}, "
            f"bias={self.bias is not None}"
        )
