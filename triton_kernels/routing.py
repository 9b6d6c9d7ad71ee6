"""Router: softmax, top-K and the stable counting sort of the slots by expert; and the gradient of the logits.

Tokens are cut into spans, one per program. `choose_kernel` writes a token's probabilities, choices and weights, and the
histogram of its span; `place_kernel` adds up the histograms before its own span, so that it knows the first free row
of every expert, and ranks its tokens with a prefix sum. A token picks an expert at most once, so a prefix sum over
tokens is one over slots. No atomics, whose order is that of the scheduler; nothing is read back by the host.

The host functions take what the native kernels of the same names take (csrc/include/rom/routing.h).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_SPANS = 256  # each program of place_kernel reads the histograms of all
FEWEST_TOKENS = 32  # of a span
TILE = 2048  # values of a [tokens, experts] tile: 16 per thread


# ------------------------------------------------------------------------------------------------ pieces
@triton.jit
def order_key(logits):
    """Integers in the order of the logits: NaN is the largest and zeros are equal whatever their sign."""
    if logits.dtype == tl.float64:
        bits = (logits + 0.0).to(tl.int64, bitcast=True)
        lowest: tl.constexpr = -(2**63)
    else:
        bits = (logits + 0.0).to(tl.int32, bitcast=True)
        lowest: tl.constexpr = -(2**31)
    key = tl.where(bits < 0, lowest - bits, bits)
    return tl.where(logits == logits, key, -(lowest + 1))  # noqa: PLR0124


@triton.jit
def tile_of(first, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """(tokens t, experts e, their places in (tokens, experts), which t exist, which places exist)."""
    t, e = first + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    here = (t < tokens)[:, None] & (e < experts)[None, :]
    return t, e, t.to(tl.int64)[:, None] * experts + e[None, :], t < tokens, here


@triton.jit
def exp_below_zero(x):
    """exp(x) for x ≤ 0 within 1 ulp; zero below −87, as on the CPU. Triton's own loses a digit at −20."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - n * 0.693359375 - n * -2.12194440e-4  # ln 2 in two parts, the first exact in the product
        series = tl.full(x.shape, 1.0 / 5040, tl.float32)
        series = series * r + 1.0 / 720
        series = series * r + 1.0 / 120
        series = series * r + 1.0 / 24
        series = series * r + 1.0 / 6
        series = series * r + 0.5
        series = series * r + 1.0
        series = series * r + 1.0
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -87.0, 0.0, series * power)


@triton.jit
def ratio(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def softmax_rows(logits, real):
    """Softmax over the columns that are real; a row with a NaN is NaN."""
    largest = tl.max(tl.where(real, logits, float("-inf")), 1)
    e = tl.where(real, exp_below_zero(logits - largest[:, None]), 0.0)
    return e * ratio(tl.full(largest.shape, 1.0, logits.dtype), tl.sum(e, 1))[:, None]


# ------------------------------------------------------------------------------------------------ forward
@triton.jit
def choose_kernel(
    logits, indices, weights, probs, table,
    tokens, experts, span, routed_scale,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """probs, indices and weights of a span of tokens, and its histogram as a row of `table`."""
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, tokens)
    histogram = tl.zeros([EXPERTS], tl.int32)
    for first in range(begin, end, TOKENS):
        t, e, at, inside, here = tile_of(first, end, experts, TOKENS, EXPERTS)
        x = tl.load(logits + at, mask=here, other=0.0).to(COMPUTE)
        p = softmax_rows(x, (e < experts)[None, :])
        tl.store(probs + at, p, mask=here)
        key = order_key(x)
        lowest: tl.constexpr = -(2**63) if tl.float64 == COMPUTE else -(2**31)
        key = tl.where(here, key, lowest)
        taken = tl.zeros([TOKENS, EXPERTS], tl.int32)
        total = tl.zeros([TOKENS], COMPUTE)
        for k in range(TOP_K):
            best = tl.argmax(tl.where(taken > 0, lowest, key), 1, tie_break_left=True)
            hit = e[None, :] == best[:, None]
            taken = tl.where(hit, 1, taken)
            weight = tl.sum(tl.where(hit, p, 0.0), 1)
            total += weight
            slot = t.to(tl.int64) * TOP_K + k
            tl.store(indices + slot, best, mask=inside)
            tl.store(weights + slot, weight * routed_scale, mask=inside)
        if NORMALIZE:
            tl.debug_barrier()  # the weights are read back by other threads than wrote them, perhaps
            for k in range(TOP_K):
                slot = t.to(tl.int64) * TOP_K + k
                weight = tl.load(weights + slot, mask=inside, other=0.0)
                tl.store(weights + slot, ratio(weight, total), mask=inside)
        histogram += tl.sum(tl.where(here, taken, 0), 0)
    tl.store(table + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), histogram)


@triton.jit
def place_kernel(
    indices, table, counts, offsets, perm, inv,
    tokens, experts, span, spans,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """perm and inv of a span of tokens; the first program writes counts and offsets."""
    mine = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    total, before = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    for first in range(0, spans, ROWS):
        row = first + tl.arange(0, ROWS)
        part = tl.load(table + row[:, None] * EXPERTS + e[None, :], mask=(row < spans)[:, None], other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((row < mine)[:, None], part, 0), 0)
    through = tl.cumsum(total, 0)
    if mine == 0:
        tl.store(counts + e, total, mask=e < experts)
        tl.store(offsets + 1 + e, through, mask=e < experts)
        tl.store(offsets, 0)
    free = through - total + before
    begin = mine * span
    end = tl.minimum(begin + span, tokens)
    for first in range(begin, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        inside = t < end
        member = tl.zeros([TOKENS, EXPERTS], tl.int32)
        for k in range(TOP_K):
            chosen = tl.load(indices + t.to(tl.int64) * TOP_K + k, mask=inside, other=-1)
            member += (chosen[:, None] == e[None, :]).to(tl.int32)
        row_of = free[None, :] + tl.cumsum(member, 0) - member
        for k in range(TOP_K):
            slot = t * TOP_K + k
            chosen = tl.load(indices + slot, mask=inside, other=-1)
            row = tl.sum(tl.where(chosen[:, None] == e[None, :], row_of, 0), 1)
            tl.store(perm + row, slot, mask=inside)
            tl.store(inv + slot, row, mask=inside)
        free += tl.sum(member, 0)


# ------------------------------------------------------------------------------------------------ backward
@triton.jit
def backward_kernel(
    probs, indices, weights, grad_weights, grad_probs, grad_logits,
    tokens, experts, routed_scale,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """grad_logits = p (g − Σ g p) with g the gradient of the probabilities, those of the weights among them.

    With NORMALIZE w = scale · p / Σ p over a token's choices, hence g = (scale · grad_w − Σ grad_w w) / Σ p there.
    """
    t, e, at, inside, here = tile_of(tl.program_id(0) * TOKENS, tokens, experts, TOKENS, EXPERTS)
    p = tl.load(probs + at, mask=here, other=0.0)
    g = tl.zeros_like(p)
    if grad_probs is not None:
        g = tl.load(grad_probs + at, mask=here, other=0.0)
    chosen_p, product = tl.zeros([TOKENS], p.dtype), tl.zeros([TOKENS], p.dtype)
    if NORMALIZE:
        for k in range(TOP_K):
            slot = t.to(tl.int64) * TOP_K + k
            chosen = tl.load(indices + slot, mask=inside, other=0)
            chosen_p += tl.sum(tl.where(chosen[:, None] == e[None, :], p, 0.0), 1)
            grad = tl.load(grad_weights + slot, mask=inside, other=0.0)
            product += grad * tl.load(weights + slot, mask=inside, other=0.0)
    for k in range(TOP_K):
        slot = t.to(tl.int64) * TOP_K + k
        chosen = tl.load(indices + slot, mask=inside, other=-1)
        grad = tl.load(grad_weights + slot, mask=inside, other=0.0) * routed_scale
        if NORMALIZE:
            grad = ratio(grad - product, chosen_p)
        g += tl.where(chosen[:, None] == e[None, :], grad[:, None], 0.0)
    tl.store(grad_logits + at, p * (g - tl.sum(g * p, 1)[:, None]), mask=here)


# ------------------------------------------------------------------------------------------------ host
def _tile(experts: int) -> dict[str, int]:
    width = max(triton.next_power_of_2(experts), 2)
    return {"TOKENS": min(max(TILE // width, 1), 256), "EXPERTS": width}


def _spans(tokens: int, tile: int) -> tuple[int, int]:
    """(number of spans, tokens of each): a function of the shape only, whole tiles, at least one span."""
    span = max(triton.cdiv(triton.cdiv(tokens, MAX_SPANS), tile) * tile, min(tile, FEWEST_TOKENS), 1)
    return max(triton.cdiv(tokens, span), 1), span


def route_forward_workspace(logits: torch.Tensor, **_: object) -> int:
    """Bytes of scratch memory: a histogram per span."""
    tokens, experts = logits.shape
    tile = _tile(experts)
    return _spans(tokens, tile["TOKENS"])[0] * tile["EXPERTS"] * 4


def route_forward(
    logits: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    inv: torch.Tensor,
    probs: torch.Tensor,
    normalize: int,
    routed_scale: float,
    workspace: torch.Tensor,
) -> None:
    """rom_route_forward of csrc/include/rom/routing.h."""
    (tokens, experts), top_k = logits.shape, indices.shape[1]
    tile = _tile(experts)
    spans, span = _spans(tokens, tile["TOKENS"])
    table = workspace.view(torch.int32)
    choose_kernel[(spans,)](
        logits, indices, weights, probs, table, tokens, experts, span, routed_scale,
        TOP_K=top_k, NORMALIZE=bool(normalize), COMPUTE=tl.float64 if probs.dtype == torch.float64 else tl.float32,
        num_warps=4, **tile,
    )  # fmt: skip
    rows = max(TILE // tile["EXPERTS"], 1)
    place_kernel[(spans,)](
        indices, table, counts, offsets, perm, inv, tokens, experts, span, spans,
        TOP_K=top_k, ROWS=rows, num_warps=4, **tile,
    )  # fmt: skip


def route_backward(
    probs: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    grad_weights: torch.Tensor,
    grad_probs: torch.Tensor | None,
    grad_logits: torch.Tensor,
    normalize: int,
    routed_scale: float,
) -> None:
    """rom_route_backward of csrc/include/rom/routing.h."""
    (tokens, experts), top_k = probs.shape, indices.shape[1]
    tile = _tile(experts)
    if tokens > 0:
        backward_kernel[(triton.cdiv(tokens, tile["TOKENS"]),)](
            probs, indices, weights, grad_weights, grad_probs, grad_logits, tokens, experts, routed_scale,
            TOP_K=top_k, NORMALIZE=bool(normalize), num_warps=4, **tile,
        )  # fmt: skip
