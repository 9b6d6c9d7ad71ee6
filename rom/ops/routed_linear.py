"""`routed_linear`: every token through the weight matrices of the experts it was routed to."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rom import dispatch, native
from rom.ops import _op
from rom.ops import _routed_linear_gpu as gpu
from rom.ops.routing import Routing
from rom.reference import routing as reference

ROWS = ("token", "expert")


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
    x, weight, bias = _op.autocast(x), _op.autocast(weight), _op.autocast(bias)
    _validate(x, weight, routing, bias, rows_in, rows_out)
    if weight.shape[0] == 1:  # one expert: both orders are the same, and this is nn.Linear
        return _single(x, weight[0], None if bias is None else bias[0], routing.weights if weighted else None)
    why = gpu.refusal(weight)
    backend = dispatch.choose("routed_linear", x.device.type, (("triton", why),) if why else ())
    if backend == "reference":
        return reference.routed_linear(x, weight, routing, bias, weighted, rows_in, rows_out)
    weights = routing.weights if weighted else None
    order = (routing.offsets, routing.perm, routing.inv)
    return torch.ops.rom.routed_linear(x, weight, bias, weights, *order, rows_in, rows_out, backend)


def _single(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    out = F.linear(x, weight, bias)
    return out if weights is None else (out * weights.to(_op.compute_dtype(x.dtype))).to(x.dtype)


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


# ------------------------------------------------------------------------------------------------ CPU
class _Block(NamedTuple):
    """The rows of one expert."""

    expert: int
    rows: slice
    tokens: torch.Tensor  # int64, the token of each row
    weights: torch.Tensor | None  # (rows, 1), in the compute type


def _blocks(
    offsets: torch.Tensor, perm: torch.Tensor, inv: torch.Tensor, weights: torch.Tensor | None, compute: torch.dtype
) -> Iterator[_Block]:
    slots = perm.long()
    tokens = slots if inv.shape[1] == 1 else slots // inv.shape[1]
    by_row = None if weights is None else weights.to(compute).flatten()[slots, None]
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        rows = slice(start, end)
        yield _Block(expert, rows, tokens[rows], None if by_row is None else by_row[rows])


def _read(x: torch.Tensor, order: str, block: _Block) -> torch.Tensor:
    """The rows of a block: a view in expert order, a copy in token order."""
    return x[block.rows] if order == "expert" else x.index_select(0, block.tokens)


class _Output:
    """A result in either order.

    Blocks are written one after the other, and a token has at most one row in a block, so its K rows add up in the
    order of the experts: deterministic. Only one block of expert rows exists at a time. A whole table of them would be
    fresh memory, whose page faults take longer than the permutation itself (24 of 33 ms for 4096 × 3072 in float32).
    """

    def __init__(self, order: str, columns: int, inv: torch.Tensor, like: torch.Tensor) -> None:
        self.order, self.dtype = order, like.dtype
        tokens, top_k = inv.shape
        if order == "expert":
            self.table = native.empty((tokens * top_k, columns), like.dtype, like.device)
        else:
            self.table = like.new_zeros(
                tokens, columns, dtype=_op.compute_dtype(like.dtype) if top_k > 1 else like.dtype
            )

    def product(
        self, left: torch.Tensor, right: torch.Tensor, block: _Block, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """left · right + bias; in expert order it is in its place already."""
        out = self.table[block.rows] if self.order == "expert" else None
        return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)

    def write(self, product: torch.Tensor, block: _Block) -> None:
        if self.order == "token":  # index_add_ into zeros is 2.5 times as fast as index_copy_
            self.table.index_add_(0, block.tokens, product.to(self.table.dtype))

    def result(self) -> torch.Tensor:
        return self.table.to(self.dtype)


def _cpu_forward(
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
    """One library GEMM per expert."""
    out = _Output(rows_out, weight.shape[1], inv, x)
    for block in _blocks(offsets, perm, inv, weights, _op.compute_dtype(x.dtype)):
        if block.rows.start == block.rows.stop:
            continue
        offset = None if bias is None else bias[block.expert]
        y = out.product(_read(x, rows_in, block), weight[block.expert].mT, block, offset)
        if block.weights is not None:
            y *= block.weights
        out.write(y, block)
    return out.result()


def _cpu_backward(
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
) -> gpu.Grads:
    """With dO the gradient and R the weights:  dx = R dO W,  dW = (R dO)ᵀ x,  db = Σ R dO, and
    dR = ⟨dO, x Wᵀ + b⟩ = ⟨dO W, x⟩ + ⟨dO, b⟩, so that no expert output has to be kept for it."""
    needs_x, needs_weight, needs_bias, needs_weights = needs
    compute = _op.compute_dtype(x.dtype)
    out = _Output(rows_in, weight.shape[2] if needs_x or needs_weights else 0, inv, x)
    grad_weight = native.empty(weight.shape if needs_weight else 0, x.dtype, x.device)
    grad_bias = native.empty(bias.shape if bias is not None and needs_bias else 0, x.dtype, x.device)
    dots = native.empty(perm.shape[0] if needs_weights else 0, compute, x.device)
    for block in _blocks(offsets, perm, inv, weights, compute):
        d, rows = _read(grad, rows_out, block), _read(x, rows_in, block)
        if needs_x or needs_weights:
            back = out.product(d, weight[block.expert], block)
            if needs_weights:
                torch.sum(back * rows.to(compute), -1, out=dots[block.rows])
                if bias is not None:
                    dots[block.rows] += d.to(compute) @ bias[block.expert].to(compute)
            if block.weights is not None:
                back *= block.weights
            out.write(back, block)
        if block.weights is not None:
            d = (d * block.weights).to(d.dtype)
        if needs_weight:
            torch.mm(d.mT, rows, out=grad_weight[block.expert])
        if needs_bias:
            grad_bias[block.expert] = d.sum(0, dtype=compute)
    grad_x = out.result() if needs_x else x.new_empty(0)
    if weights is None or not needs_weights:
        return grad_x, grad_weight, grad_bias, x.new_empty(0)
    return grad_x, grad_weight, grad_bias, dots[inv.long()].to(weights.dtype)


dispatch.register("routed_linear", "triton", gpu.forward, gpu.backward, module=gpu.MODULE)
dispatch.register("routed_linear", "cpu", _cpu_forward, _cpu_backward)
# Never through the op: plain torch needs no opaque one, neither to be traced nor to be differentiated twice.
dispatch.register("routed_linear", "reference", reference.routed_linear)


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
