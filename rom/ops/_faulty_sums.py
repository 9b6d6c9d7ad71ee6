"""Which sums of a product are wrong on the way, in the order in which a kernel meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rom.faults.records import Target
from rom.reference import faults as reference
from rom.reference.faults import ALL, BAD, Events, Extents

STEP = 32  # accumulators can be named after multiples of it


class Weights(NamedTuple):
    """Elements of a shared B that sites name for one sample only, ascending in (sample, col, k)."""

    group: torch.Tensor  # int64 [W]: sample · N + col
    k: torch.Tensor  # int64 [W]
    value: torch.Tensor  # [W], dtype of b
    changed: torch.Tensor  # bool [W]: the value is another than B's
    site: torch.Tensor  # int64 [n]: the rows of the table
    element: torch.Tensor  # int64 [n]: which element each of them names


def strides(extents: Extents) -> Extents:
    """Of a contiguous tensor of dimensions (sample, row, k, col), without those that have no extent."""
    _, row, col, k = extents
    matrix = max(k, 1) * max(col, 1)
    return max(row, 1) * matrix, matrix if row else 0, 1 if col else 0, max(col, 1) if k else 0


def of(table: torch.Tensor, target: Target) -> torch.Tensor:
    """The rows of a target's sites."""
    return (table[:, 6] & 0xFFFF == target).nonzero()[:, 0]


def samples_own(table: torch.Tensor, b: torch.Tensor, samples: int) -> torch.Tensor:
    """The rows of sites that make a shared weight wrong for one sample of the batch."""
    site = of(table, Target.B) if b.dim() == 2 else table.new_zeros(0, dtype=torch.int64)
    sample = table[site, 0]
    return site[(sample != ALL) & (sample >= 0) & (sample < samples)]


def wrong_weights(
    patch: Callable[..., None], b: torch.Tensor, table: torch.Tensor, log: torch.Tensor, samples: int
) -> Weights:
    """Patches single weights, a copy per sample."""
    k_size, cols = b.shape[-2:]
    site = samples_own(table, b, samples)
    bad = reference.bad_sites(table[site], (samples, 0, cols, k_size), b.element_size())
    log[site[bad], 0] = BAD
    site = site[~bad]
    sample, _, col, k = table[site, :4].long().unbind(1)
    key, element = torch.unique((sample * cols + col) * k_size + k, return_inverse=True)
    group, k = key // k_size if k_size else key, key % k_size if k_size else key
    clean = b[k, group % cols] if len(key) else b.new_empty(0)
    value, own = clean.clone(), table[site]
    own[:, 0], own[:, 1] = ALL, element.to(torch.int32)
    own_log = log.new_zeros(len(site), 3)
    patch(value, own, own_log, Target.B, (0, len(key), 0, 0), (0, 1, 0, 0))
    log[site] = own_log
    integers = reference.INTEGERS[value.element_size()] if value.element_size() < 8 else torch.int64
    return Weights(group, k, value, value.view(integers) != clean.view(integers), site, element)


def events(
    table: torch.Tensor, log: torch.Tensor, weights: Weights, extents: Extents, rows: int, cast: bool
) -> tuple[Events, torch.Tensor]:
    """(events of all sums that are wrong, which of them are the first of their site).

    extents: those of accumulators, with K + 1 for k. cast: values before the cast are sums, too. rows: M, all of which
    a wrong weight reaches.
    """
    samples, all_rows, cols, k_size = *extents[:3], extents[3] - 1
    site = torch.cat([of(table, Target.ACCUMULATOR), *([of(table, Target.BEFORE_CAST)] if cast else [])])
    target = table[site, 6] & 0xFFFF
    k = torch.where(target == Target.ACCUMULATOR, table[site, 3].long(), k_size + 1)
    size = 8 if weights.value.dtype == torch.float64 else 4
    bad = reference.bad_sites(table[site], (samples, all_rows, cols, 0), size)
    bad |= (target == Target.ACCUMULATOR) & ((k < 0) | (k > k_size) | ((k % STEP != 0) & (k != k_size)))
    log[site[bad], 0] = BAD
    site, k = site[~bad], k[~bad]
    which, sample, first = reference.expand(table[site, 0].long(), samples)
    here = (sample >= 0) & (sample < samples)
    which, sample, first = which[here], sample[here], first[here]
    place = (sample * all_rows + table[site[which], 1]) * cols + table[site[which], 2]
    order = (place * (k_size + 2) + k[which]).argsort(stable=True)
    which, place, first = which[order], place[order], first[order]
    wrong, wrong_k, values = (x[weights.changed] for x in weights[:3])
    group = torch.unique_consecutive(wrong)
    reached = (group // cols * rows)[:, None] + torch.arange(rows, device=table.device)
    outputs = torch.unique(torch.cat([place, (reached * cols + (group % cols)[:, None]).flatten()]))
    starts = torch.searchsorted(place, torch.cat([outputs, outputs.new_full((1,), samples * all_rows * cols)]))
    mine = outputs // (all_rows * cols) * cols + outputs % cols
    ranges = torch.stack([torch.searchsorted(wrong, mine, right=right) for right in (False, True)], 1)
    return Events(outputs, starts, site[which], k[which], ranges, wrong_k, values), first


def record(log: torch.Tensor, events: Events, first: torch.Tensor, bits: torch.Tensor) -> None:
    """Writes what happened to the sums into the log of their sites."""
    rows = events.rows[first]
    log[rows, 0] = 1
    log[rows, 1:] = bits[first]
