"""`routed_linear`: every token through the weight matrices of the experts it was routed to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from rom import dispatch, native
from rom.ops import _op
from rom.ops.routing import Routing
from rom.reference import routing as reference

ROWS = ("token", "expert")
# grad_x, grad_weight, grad_bias, grad_weights (empty where not asked for)
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    weighted: bool = False,
    rows_in: str = "token",
    rows_out: str = "token",
) -> torch.Tensor:
    """A linear layer with one weight matrix per expert.

        row r of expert e:   y_r = x_r W_eᵀ + b_e,   times its routing weight if `weighted`
        token t:             out_t = Σ_k y of its K rows

    Rows come in one of two orders: "token" has one row per token, "expert" one per slot, sorted by expert (row r holds
    slot `routing.perm[r]`). Between two projections of a block, expert order saves the permutation.

    Args:
        x: `[T, in]`, or `[T·K, in]` with rows_in="expert". float32, bfloat16, float16 or float64.
        weight: `[E, out, in]`, dtype of x.
        routing: from `rom.ops.route`, for these T tokens and E experts.
        bias: `[E, out]`, dtype of x.
        weighted: multiply by `routing.weights`, in float32.
        rows_in, rows_out: "token" or "expert".

    Returns:
        `[T, out]`, or `[T·K, out]` with rows_out="expert", in x's dtype; under autocast x, weight and bias are cast to
        its dtype, the routing weights are not. Products and the sum over K accumulate in float32, in a fixed order.
        Gradients flow to x, weight (zero for an expert without rows), bias and `routing.weights`.

    Raises:
        ValueError: a shape does not match, or the routing is of another batch. TypeError: x, weight and bias differ in
        dtype, or routing is not a `rom.Routing`.

    Source: "Routing Mamba" (arXiv 2506.18145), the three expert projections of a block.

    >>> routing = rom.ops.route(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), top_k=1)
    >>> weight = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # expert 0 picks the first feature, expert 1 the second
    >>> rom.ops.routed_linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), weight, routing)
    tensor([[2.],
            [3.]])
    """
    x, weight, bias = _autocast(x, weight, bias)
    _validate(x, weight, routing, bias, rows_in, rows_out)
    if weight.shape[0] == 1:  # one expert: both orders are the same, and this is nn.Linear
        return _single(x, weight[0], None if bias is None else bias[0], routing.weights if weighted else None)
    backend = dispatch.choose("routed_linear", x.device.type)
    if backend == "reference" and not torch.compiler.is_compiling():
        return reference.routed_linear(x, weight, routing, bias, weighted, rows_in, rows_out)
    weights = routing.weights if weighted else None
    order = (routing.offsets, routing.perm, routing.inv)
    return torch.ops.rom.routed_linear(x, weight, bias, weights, *order, rows_in, rows_out, backend)


def _single(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    out = F.linear(x, weight, bias)
    return out if weights is None else (out * weights.to(_op.compute_dtype(x.dtype))).to(x.dtype)


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if not isinstance(x, torch.Tensor) or (dtype := _op.autocast_dtype(x.device.type)) is None:
        return x, weight, bias

    def cast(t: torch.Tensor) -> torch.Tensor:
        eligible = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


def _validate(
    x: torch.Tensor, weight: torch.Tensor, routing: Routing, bias: torch.Tensor | None, rows_in: str, rows_out: str
) -> None:
    op = "routed_linear"
    if not isinstance(routing, Routing):
        raise TypeError(f"rom.ops.{op}: expected routing to be a rom.Routing, got {type(routing).__name__}.")
    _op.check_tensors(op, "x", x=x, weight=weight, bias=bias, routing=routing.indices)
    _op.check_floating(op, "x", x)
    _op.check_same_dtype(op, "x", x=x, weight=weight, bias=bias)
    for name, rows in (("rows_in", rows_in), ("rows_out", rows_out)):
        if rows not in ROWS:
            _op.fail(op, f'{name} "token" or "expert"', repr(rows))
    if x.dim() != 2:
        _op.fail(op, "x of shape (rows, in_features)", str(_op.shape(x)), "Flatten the leading dimensions.")
    tokens, top_k, experts = routing.num_tokens, routing.top_k, routing.num_experts
    if weight.dim() != 3 or weight.shape[0] != experts or weight.shape[2] != x.shape[1]:
        expected = f"weight of shape ({experts} experts, out_features, {x.shape[1]} in_features)"
        _op.fail(op, expected, str(_op.shape(weight)))
    _op.check_shape(op, "bias", bias, tuple(weight.shape[:2]))
    expected_rows = tokens if rows_in == "token" else tokens * top_k
    if x.shape[0] != expected_rows:
        slots = "" if rows_in == "token" else f" × top_k {top_k} rows in expert order"
        _op.fail(
            op,
            f"x for the routing's {tokens} tokens{slots}",
            f"x of {x.shape[0]} rows",
            "A routing belongs to the batch it was built from; call rom.ops.route on this batch.",
        )


# ------------------------------------------------------------------------------------------------ rows
def _gather(x: torch.Tensor, perm: torch.Tensor, top_k: int) -> torch.Tensor:
    """Token rows in expert order."""
    return x.index_select(0, perm if top_k == 1 else perm.div(top_k, rounding_mode="floor"))


def _scale(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Every row times its weight, in the compute type."""
    return rows if weights is None else (rows * weights[:, None]).to(rows.dtype)


def _combine(rows: torch.Tensor, inv: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Expert rows to token rows: Σ_k of the K rows of a token, times their weights."""
    compute = _op.compute_dtype(rows.dtype)
    taken = _scale(rows.index_select(0, inv.flatten()), weights)
    if inv.shape[1] == 1:
        return taken
    return taken.unflatten(0, inv.shape).sum(1, dtype=compute).to(rows.dtype)


# ------------------------------------------------------------------------------------------------ blocks of rows
# Products of the rows of each expert with its matrix: what a backend has to bring.
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Outer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sizes(offsets: torch.Tensor) -> list[int]:
    ends = offsets.tolist()
    return [end - start for start, end in pairwise(ends)]


def _blocks_product(
    rows: torch.Tensor, matrix: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One library GEMM per expert, straight into its block of rows. matrix: `[E, in, out]`."""
    out = native.empty((rows.shape[0], matrix.shape[2]), rows.dtype, rows.device)
    sizes = _sizes(offsets)
    blocks = zip(rows.split(sizes), matrix.unbind(0), out.split(sizes))
    for i, (x, w, y) in enumerate(blocks):
        if bias is None:
            torch.mm(x, w, out=y)
        else:
            torch.addmm(bias[i], x, w, out=y)
    return out


def _blocks_outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`[E, left, right]`: leftᵀ · right over the rows of each expert; zeros where there are none."""
    sizes = _sizes(offsets)
    out = native.empty((len(sizes), left.shape[1], right.shape[1]), left.dtype, left.device)
    for a, b, o in zip(left.split(sizes), right.split(sizes), out.unbind(0)):
        torch.mm(a.mT, b, out=o)
    return out


def _masks(offsets: torch.Tensor, rows: int) -> list[torch.Tensor]:
    place = torch.arange(rows, device=offsets.device)[:, None]
    return [(place >= start) & (place < end) for start, end in zip(offsets.unbind(), offsets[1:].unbind())]


def _masked_product(
    rows: torch.Tensor, matrix: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Every expert on all rows, without reading the offsets on the host: as the reference does it."""
    out = rows.new_zeros(rows.shape[0], matrix.shape[2])
    for i, (mask, w) in enumerate(zip(_masks(offsets, rows.shape[0]), matrix.unbind(0))):
        out = torch.where(mask, rows @ w if bias is None else rows @ w + bias[i], out)
    return out


def _masked_outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.where(mask, left, 0).mT @ right for mask in _masks(offsets, left.shape[0])])


# ------------------------------------------------------------------------------------------------ implementations
def _forward_with(product: Product) -> Callable[..., torch.Tensor]:
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
        rows = _gather(x, perm, inv.shape[1]) if rows_in == "token" else x
        out = product(rows, weight.mT, offsets, bias)
        flat = None if weights is None else weights.to(_op.compute_dtype(x.dtype)).flatten()
        if rows_out == "token":
            return _combine(out, inv, flat)
        return _scale(out, None if flat is None else flat[perm])

    return forward


def _backward_with(product: Product, outer: Outer) -> Callable[..., Grads]:
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
        needs_x, needs_weight, needs_bias, needs_weights = needs
        compute, top_k, empty = _op.compute_dtype(x.dtype), inv.shape[1], x.new_empty(0)
        flat = None if weights is None else weights.to(compute).flatten()
        by_row = None if flat is None else flat[perm]
        grad = _gather(grad, perm, top_k) if rows_out == "token" else grad
        grad_x = grad_weight = grad_bias = grad_weights = empty
        back = product(grad, weight, offsets, None) if needs_x or needs_weights else empty
        rows = _gather(x, perm, top_k) if rows_in == "token" and (needs_weight or needs_weights) else x
        if weights is not None and needs_weights:
            # dR = ⟨dO, x Wᵀ + b⟩ = ⟨dO W, x⟩ + ⟨dO, b⟩: no expert output has to be kept for it.
            dots = (back.to(compute) * rows.to(compute)).sum(-1)
            if bias is not None:
                dots += product(grad, bias[:, :, None], offsets, None).squeeze(-1).to(compute)
            grad_weights = dots[inv.flatten()].view(inv.shape).to(weights.dtype)
        if needs_x:
            grad_x = _combine(back, inv, flat) if rows_in == "token" else _scale(back, by_row)
        grad = _scale(grad, by_row)
        if needs_weight:
            grad_weight = outer(grad, rows, offsets)
        if needs_bias:
            grad_bias = outer(grad, grad.new_ones(len(perm), 1), offsets).squeeze(-1)
        return grad_x, grad_weight, grad_bias, grad_weights

    return backward


dispatch.register(
    "routed_linear", "cpu", _forward_with(_blocks_product), _backward_with(_blocks_product, _blocks_outer)
)
dispatch.register(
    "routed_linear", "reference", _forward_with(_masked_product), _backward_with(_masked_product, _masked_outer)
)


# ------------------------------------------------------------------------------------------------ registration
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? weights, Tensor offsets, Tensor perm, Tensor inv,"
    " str rows_in, str rows_out"
)
_op.define(f"routed_linear({_ARGUMENTS}, str backend) -> Tensor")
_op.define(
    f"routed_linear_backward(Tensor grad, {_ARGUMENTS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*arguments):  # type: ignore[no-untyped-def]
    *given, backend = arguments
    return dispatch.implementation("routed_linear", backend).forward(*given)


def _backward(*arguments):  # type: ignore[no-untyped-def]
    *given, backend = arguments
    run = dispatch.implementation("routed_linear", backend).backward
    assert run is not None
    return run(*given)


_op.LIBRARY.impl("routed_linear", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("routed_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::routed_linear")
def _(x, weight, bias, weights, offsets, perm, inv, rows_in, rows_out, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((inv if rows_out == "token" else perm).shape[0], weight.shape[1])


@torch.library.register_fake("rom::routed_linear_backward")
def _(grad, x, weight, bias, weights, offsets, perm, inv, rows_in, rows_out, needs, backend):  # type: ignore[no-untyped-def]
    kept = [t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip((x, weight, bias, weights), needs)]
    return tuple(kept)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.rows_in, ctx.rows_out, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):  # type: ignore[no-untyped-def]
    needs = [bool(n) for n in ctx.needs_input_grad[:4]]
    grads = torch.ops.rom.routed_linear_backward(
        grad, *ctx.saved_tensors, ctx.rows_in, ctx.rows_out, needs, ctx.backend
    )
    return *(g if need else None for g, need in zip(grads, needs)), None, None, None, None, None, None


torch.library.register_autograd("rom::routed_linear", _autograd, setup_context=_setup)
