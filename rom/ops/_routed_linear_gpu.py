"""`routed_linear` on a GPU: which rows the products of triton_kernels/routed_linear.py read and write where.

A result in token order with K > 1 is a table of all slots first, in the type of sums, whose K rows per token are added
in order.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from rom import native
from rom.ops import _op

MODULE = "rom.triton_kernels.routed_linear"
KERNELS = _op.Triton(MODULE)
# grad_x, grad_weight, grad_bias, grad_weights (empty where not asked for)
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def refusal(weight: torch.Tensor) -> str:
    """Why these kernels cannot take a call; empty if they can."""
    return "" if weight.numel() else "the weight has no elements"


def _into(order: str, columns: int, inv: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Memory for the products' rows."""
    top_k = inv.shape[1]
    dtype = _op.compute_dtype(like.dtype) if order == "token" and top_k > 1 else like.dtype
    return native.empty((inv.numel(), columns), dtype, like.device)


def _out_of(rows: torch.Tensor, order: str, inv: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The result: those rows, or their sums over the K of a token."""
    if order == "expert" or inv.shape[1] == 1:
        return rows
    out = native.empty((inv.shape[0], rows.shape[1]), like.dtype, like.device)
    KERNELS.call("add_slots", like.device, table=rows, out=out)
    return out


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    inv: torch.Tensor,
    rows_in: str,
    rows_out: str,
) -> torch.Tensor:
    """See `rom.ops.routed_linear`."""
    if perm.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    rows = _into(rows_out, weight.shape[1], inv, x)
    KERNELS.call(
        "product",
        x.device,
        x=_op.unit_stride(x),
        weight=weight.contiguous(),
        offsets=offsets,
        perm=perm,
        out=rows,
        top_k=inv.shape[1],
        gather=rows_in == "token",
        scatter=rows_out == "token",
        k_first=False,
        row_weight=_op.contiguous(weights),
        bias=_op.contiguous(bias),
    )
    return _out_of(rows, rows_out, inv, x)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    inv: torch.Tensor,
    rows_in: str,
    rows_out: str,
    needs: list[bool],
) -> Grads:
    """The formulas of `rom.ops.routed_linear._cpu_backward`."""
    needs_x, needs_weight, needs_bias, needs_weights = needs
    none, device = x.new_empty(0), x.device
    if perm.shape[0] == 0:
        given = (x, weight, bias, weights)
        empty = [torch.zeros_like(t) if need and t is not None else none for t, need in zip(given, needs)]
        return empty[0], empty[1], empty[2], empty[3]
    unit, dy = _op.unit_stride(x), _op.unit_stride(grad)
    assert dy is not None
    shared: dict[str, Any] = {"offsets": offsets, "perm": perm, "top_k": inv.shape[1]}
    gathered = {"gather_dy": rows_out == "token"}
    row_weight = _op.contiguous(weights)
    grad_x, grad_weights = none, none
    if needs_x or needs_weights:
        weight = weight.contiguous()
        rows = _into(rows_in, weight.shape[2], inv, x)
        dots: dict[str, Any] = {}
        if needs_weights:
            assert weights is not None
            plan = importlib.import_module(MODULE).dot_tiles
            lines = plan(dy, weight, perm.shape[0], rows_out == "token")
            partial = native.empty((lines, perm.shape[0]), weights.dtype, device)
            dots = {"partner": unit, "gather_partner": rows_in == "token", "dots": partial}
        KERNELS.call(
            "product",
            device,
            x=dy,
            weight=weight,
            out=rows,
            gather=rows_out == "token",
            scatter=rows_in == "token",
            k_first=True,
            row_weight=row_weight,
            **shared,
            **dots,
        )
        grad_x = _out_of(rows, rows_in, inv, x) if needs_x else none
        if needs_weights:
            assert weights is not None
            grad_weights = native.empty(weights.shape, weights.dtype, device)
            KERNELS.call(
                "add_dots", device, dots=dots["dots"], dy=dy, bias=bias, out=grad_weights, **shared, **gathered
            )
    grad_weight = native.empty(weight.shape, x.dtype, device) if needs_weight else None
    grad_bias = native.empty(bias.shape, x.dtype, device) if needs_bias and bias is not None else None
    if grad_weight is not None or grad_bias is not None:
        KERNELS.call(
            "weight_grad",
            device,
            dy=dy,
            x=unit,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            gather_x=rows_in == "token",
            row_weight=row_weight,
            **shared,
            **gathered,
        )
    return grad_x, none if grad_weight is None else grad_weight, none if grad_bias is None else grad_bias, grad_weights
