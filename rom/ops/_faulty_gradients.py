"""Gradients of a faulty product: two library products, and corrections where a site is.

With G the gradient of y, s the slope of a changed value (`slopes`) and A', B' the operands the backward pass reads:

    G ← s G at changed results;   dbias = s Σ G;   dA = s (G B'ᵀ);   dB = s (A'ᵀ G)

An accumulator changed after k products scales what the first k of them get by s; a weight wrong for one sample gets s
times that sample's share, and in the permanent case is what that sample's dA reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rom.faults.records import Target
from rom.ops import _faulty_sums as sums
from rom.ops import _op
from rom.reference import faults as reference
from rom.reference.faults import ALL, Events, Extents

Patch = Callable[..., None]
_MANTISSA = {torch.float64: 20, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}  # bits below, in its word
_EXPONENT = {torch.float64: 11, torch.float32: 8, torch.bfloat16: 8, torch.float16: 5}


def slopes(sites: torch.Tensor, log: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """Derivative of each changed value by the value it was, float64 `[n]`; 1 where nothing changed."""
    old, new = log[:, 1].long() & 0xFFFFFFFF, log[:, 2].long() & 0xFFFFFFFF
    one = torch.ones(len(sites), dtype=torch.float64, device=sites.device)
    changed = (log[:, 0] == reference.APPLIED) & (old != new)
    if mode == "zero":
        return torch.where(changed, 0.0, one)
    if mode == "ste":
        return one
    low, width = _MANTISSA[dtype], _EXPONENT[dtype]
    full = (1 << width) - 1
    exponents = [(bits >> low) & full for bits in (old, new)]
    finite = (exponents[0] != full) & (exponents[1] != full)
    shift = exponents[1].clamp(min=1) - exponents[0].clamp(min=1)  # a subnormal has the smallest normal's exponent
    slope = torch.ldexp(one, shift)
    slope = torch.where(((old ^ new) >> (low + width)) & 1 == 1, -slope, slope)
    replaced = sites[:, 4] & reference.LOW_BITS[dtype.itemsize] == 0
    slope = torch.where(finite & ~replaced, slope, 0.0)
    if dtype == torch.float64:  # the lower word is mantissa only
        slope = torch.where(sites[:, 6] >> 16 == 1, slope, 1.0)
    return torch.where(changed, slope, one)


def factors(like: torch.Tensor, index: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """A tensor of ones with the product of the slopes at every place."""
    ones = torch.ones(like.numel(), dtype=_op.compute_dtype(like.dtype), device=like.device)
    return ones.scatter_reduce(0, index, slope.to(ones.dtype), "prod").view(like.shape)


def spelled_out(table: torch.Tensor, samples: int, shared: bool) -> torch.Tensor:
    """The table with a row per sample for sites of all samples, whose log tells of the first only."""
    target = table[:, 6] & 0xFFFF
    memory = (target == Target.BIAS) | ((target == Target.B) & shared)
    sample = torch.where(memory, -2, table[:, 0].long())  # these stay as they are
    which, sample, _ = reference.expand(sample, samples)
    longer = table[which]
    longer[:, 0] = torch.where(memory[which], longer[:, 0], sample.to(torch.int32))
    return longer


def scale(
    grad: torch.Tensor,
    table: torch.Tensor,
    log: torch.Tensor,
    target: Target,
    extents: Extents,
    dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    """grad times the slopes of a target's sites; extents as in `rom.ops.faults._shapes`."""
    site = sums.of(table, target)
    site = site[log[site, 0] == reference.APPLIED]
    if not len(site):
        return grad
    samples = extents[0]
    if not samples:
        site = site[table[site, 0] == ALL]
    strides = (sums.strides(extents)[0] if samples else 0, *sums.strides(extents)[1:])
    index = sum(table[site, c].long() * stride for c, stride in enumerate(strides))
    assert isinstance(index, torch.Tensor)
    return (grad * factors(grad, index, slopes(table[site], log[site], dtype, mode))).to(grad.dtype)


def by_sums(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    table: torch.Tensor,
    log: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor],
    weights: sums.Weights,
    events: Events,
    mode: str,
    permanent: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to dA and dB what changed accumulators and weights of single samples make different."""
    compute = _op.compute_dtype(a.dtype)
    grad_a, grad_b = (g.to(compute) for g in grads)
    (_, heads, rows, k_size), cols = a.shape, grad.shape[-1]
    site_slope = slopes(table, log, compute, mode).to(compute)
    own = log[weights.site]
    weight_slope = torch.ones(len(weights.k), dtype=compute, device=a.device).scatter_reduce(
        0, weights.element, slopes(table[weights.site], own, b.dtype, mode).to(compute), "prod"
    )
    for chunk in torch.arange(len(events.outputs), device=a.device).split(4096):
        place = events.outputs[chunk]
        n, m = place % cols, place // cols % rows
        h, s = place // (cols * rows) % heads, place // (cols * rows * heads)
        left, g = a[s, h, m].to(compute), grad[s, h, m, n].to(compute)
        right = (b[:, n].mT if b.dim() == 2 else b[s, h, :, n]).to(compute)
        position = torch.arange(k_size, device=a.device)
        scaled = torch.ones_like(left)  # of the gradient of product k: the slopes of the events after it
        turn, end = events.starts[chunk], events.starts[chunk + 1]
        while (active := turn < end).any():
            event = torch.where(active, turn, 0)
            before = active[:, None] & (position < events.k[event][:, None])
            scaled = torch.where(before, scaled * site_slope[events.rows[event]][:, None], scaled)
            turn = turn + active.long()
        faulty, slope = right.clone(), torch.ones_like(right)
        for owner, element in _elements(place, weights, rows * heads, cols):
            slope[owner, weights.k[element]] = weight_slope[element]
            if permanent:
                faulty[owner, weights.k[element]] = weights.value[element].to(compute)
        change_a = g[:, None] * (scaled * faulty - right)
        change_b = g[:, None] * left * (scaled * slope - 1)
        row = ((s * heads + h) * rows + m)[:, None] * k_size + position
        column = (((s * heads + h) if b.dim() == 4 else s * 0) * k_size)[:, None] + position
        # index_put with accumulate sorts, so that duplicates add up in one order on a GPU as well
        grad_a = grad_a.reshape(-1).index_put((row,), change_a, accumulate=True).view(a.shape)
        grad_b = grad_b.reshape(-1).index_put((column * cols + n[:, None],), change_b, accumulate=True).view(b.shape)
    return grad_a.to(a.dtype), grad_b.to(b.dtype)


def _elements(place, weights, all_rows, cols):  # type: ignore[no-untyped-def]
    """(which sum, which weight of its sample and column) for all such pairs."""
    group = place // (all_rows * cols) * cols + place % cols
    low, high = (torch.searchsorted(weights.group, group, right=right) for right in (False, True))
    counts = high - low
    owner = torch.repeat_interleave(torch.arange(len(place), device=place.device), counts)
    yield owner, torch.arange(len(owner), device=place.device) + (low - (counts.cumsum(0) - counts))[owner]
