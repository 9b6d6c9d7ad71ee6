"""Flips of the last layer's outputs and weights, in float64: what a fault of one class does to loss and top-1."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def flipped(values: Tensor, bit: int) -> Tensor:
    """The values with one bit inverted, as they are stored."""
    word = _WORDS[values.element_size()]
    bits = 8 * values.element_size()
    return (values.contiguous().view(word) ^ (1 << bit if bit < bits - 1 else -(1 << bit))).view(values.dtype)


def to_logits(values: Tensor, scale: float, low: float, high: float, nan_to: float) -> Tensor:
    """What the model makes of the layer's values, in their dtype: restricted, NaN replaced, scaled."""
    values = values.clamp(low, high)
    return torch.where(values.isnan(), nan_to, values) * scale


def effects(golden: Tensor, changed: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(|loss - golden loss|, the six counts as booleans) where logit (b, k) alone is changed; `[B, C]`, `[B, C, 6]`."""
    t, new = golden.double(), changed.double()
    classes = torch.arange(t.shape[1], device=t.device)
    top, label = t.argmax(1, keepdim=True), labels[:, None]
    log_p, others = t.log_softmax(1), t.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_q = torch.log1p(-log_p.exp())  # all other classes; where p is nearly 1, q is what is known exactly
    log_q = log_q.scatter(1, top, others - t.logsumexp(1, keepdim=True))
    log_p = log_p.scatter(1, top, torch.log1p(-log_q.gather(1, top).exp()))
    # log(q + p e^d), and log(p + q e^-d) for the label itself
    is_label = classes == label
    a, b = torch.where(is_label, log_q, log_p), torch.where(is_label, log_p, log_q)
    d = torch.where(is_label, t - new, new - t)
    loss = torch.where(d.abs() < 0.5, torch.log1p(a.exp() * torch.expm1(d)), torch.logaddexp(a + d, b)).abs()

    best = t.scatter(1, top, -torch.inf).max(1, keepdim=True)  # of the others, the first
    is_top = classes == top
    rival = torch.where(is_top, best.values, t.gather(1, top))
    earlier = classes < torch.where(is_top, best.indices, top)
    first = new.isnan() | (new > rival) | ((new == rival) & earlier)  # as argmax: NaN is the largest, ties go first
    mismatch = (first != is_top) & (t.shape[1] > 1)
    due = ~new.isfinite()
    word = _WORDS[golden.element_size()]
    masked = golden.contiguous().view(word) == changed.contiguous().view(word)
    wrong, right = mismatch & ~due, top == label
    counts = (masked, ~(masked | wrong | due), wrong & ~right, wrong & right, due, mismatch)
    return torch.where(due, 0.0, loss), torch.stack(counts, -1)


def logit_flips(
    logits: Tensor, labels: Tensor, scale: float, low: float, high: float, nan_to: float, by_image: bool
) -> tuple[Tensor, Tensor]:
    """Sums over images (or classes) for every class (image) and bit: loss float64, counts int64 `[…, bits, 6]`."""
    tail = (scale, low, high, nan_to)
    golden = to_logits(logits, *tail)
    found = [
        effects(golden, to_logits(flipped(logits, bit), *tail), labels) for bit in range(8 * logits.element_size())
    ]
    other = 1 if by_image else 0
    return torch.stack([x.sum(other) for x, _ in found], 1), torch.stack([c.sum(other) for _, c in found], 1)


def weight_flips(
    features: Tensor,
    weight: Tensor,
    sums: Tensor,
    labels: Tensor,
    scale: float,
    low: float,
    high: float,
    nan_to: float,
    by_input: bool,
) -> tuple[Tensor, Tensor]:
    """The same for the weights `[C, E]` of the layer; sums `[B, C]` are its outputs before they are rounded."""
    tail, (classes, inputs), bits = (scale, low, high, nan_to), weight.shape, 8 * weight.element_size()
    golden = to_logits(sums.to(weight.dtype), *tail)
    loss = sums.new_zeros(inputs, classes, bits, dtype=torch.float64)
    counts = torch.zeros(inputs, classes, bits, 6, dtype=torch.int64, device=sums.device)
    for e, bit in product(range(inputs), range(bits)):
        column = weight[:, e].to(sums.dtype)
        changed = sums + features[:, e, None] * (flipped(weight[:, e], bit).to(sums.dtype) - column)
        lost, what = effects(golden, to_logits(changed.to(weight.dtype), *tail), labels)
        loss[e, :, bit], counts[e, :, bit] = lost.sum(0), what.sum(0)
    return loss.sum(int(by_input)), counts.sum(int(by_input))
