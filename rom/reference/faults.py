"""Faulty values and sums in plain torch: what the two primitives of fault injection mean, on any device.

Sites are an int32 `[n, 8]` table and their log int32 `[n, 3]`, both of `rom.faults.records`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ALL, APPLIED, BAD = -1, 1, -1  # as int32
INTEGERS = {8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # the words of a value of so many bytes
LOW_BITS = {8: -1, 4: -1, 2: 0xFFFF, 1: 0xFF}
Extents = tuple[int, int, int, int]  # of sample, row, col, k; 0: the target has no such coordinate


class Events(NamedTuple):
    """What happens to some sums, sorted by sum and k. Sum j has events starts[j] to starts[j + 1]."""

    outputs: torch.Tensor  # int64 [J]: which elements of y
    starts: torch.Tensor  # int64 [J + 1]
    rows: torch.Tensor  # int64 [E]: the site of each event
    k: torch.Tensor  # int64 [E]: it happens after so many products; K + 1: after the bias
    weight_starts: torch.Tensor  # int64 [J, 2]: the range of weights that are wrong for this sum
    weight_k: torch.Tensor  # int64 [W]
    weights: torch.Tensor  # [W], dtype of b


def word_values(bits: torch.Tensor, masks: torch.Tensor, size: int) -> torch.Tensor:
    """(bits & and_mask) ^ xor_mask for words of values of `size` bytes; masks int32 [..., 2]."""
    return (bits & masks[..., 0].to(bits.dtype)) ^ masks[..., 1].to(bits.dtype)


def expand(sample: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(which site, its sample, whether it is the site's first) with ALL written out."""
    counts = torch.where(sample == ALL, samples, 1)
    which = torch.repeat_interleave(torch.arange(len(sample), device=sample.device), counts)
    rank = torch.arange(len(which), device=sample.device) - (counts.cumsum(0) - counts)[which]
    return which, torch.where(sample[which] == ALL, rank, sample[which]), rank == 0


def bad_sites(table: torch.Tensor, extents: Extents, size: int) -> torch.Tensor:
    """Which sites name a coordinate that is not there, or the upper word of a value that has one word only."""
    wrong = (table[:, 6] >> 16 != 0) & (size != 8)
    for column, extent in zip((1, 2, 3), extents[1:]):
        if extent:
            wrong |= (table[:, column] < 0) | (table[:, column] >= extent)
    return wrong


def patch(
    values: torch.Tensor, table: torch.Tensor, log: torch.Tensor, target: int, extents: Extents, strides: Extents
) -> None:
    """Applies the sites of a target to dense memory, in the table's order, and writes their log.

    extents[0] = 0: memory that all samples share, so that only sites of ALL belong to it.
    """
    size = values.element_size()
    flat = torch.as_strided(values, (values.numel(),), (1,))
    words = flat.view(INTEGERS[size])
    mine = (table[:, 6] & 0xFFFF == target).nonzero()[:, 0]
    if not extents[0]:
        mine = mine[table[mine, 0] == ALL]
    bad = bad_sites(table[mine], extents, size)
    log[mine[bad], 0] = BAD
    mine = mine[~bad]
    which, sample, first = expand(table[mine, 0].long(), extents[0] or 1)
    here = (sample >= 0) & (sample < max(extents[0], 1))
    which, sample, first = which[here], sample[here], first[here]
    sites = table[mine[which]]
    index = sample * strides[0] + sum(sites[:, c].long() * strides[c] for c in (1, 2, 3))
    if size == 8:
        index = 2 * index + (sites[:, 6] >> 16)
    for turn in _turns(index):  # sites of one word follow each other
        old = words[index[turn]]
        new = word_values(old, sites[turn, 4:6], size)
        words[index[turn]] = new
        logged = turn[first[turn]]
        entries = torch.stack([old, new], 1)[first[turn]].to(torch.int32) & LOW_BITS[size]
        log[mine[which[logged]], 0] = APPLIED
        log[mine[which[logged]], 1:] = entries


def _turns(index: torch.Tensor) -> list[torch.Tensor]:
    """Positions of the first occurrence of every value, of the second, …"""
    order = index.argsort(stable=True)
    ordered = index[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    position = torch.arange(len(index), device=index.device)
    rank = position - torch.where(new, position, 0).cummax(0).values if len(index) else position
    return [order[rank == r] for r in range(int(rank.max()) + 1 if len(rank) else 0)]


def accumulate(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    table: torch.Tensor,
    events: Events,
    exact: bool,
) -> torch.Tensor:
    """Sums again the products of `events.outputs` and applies what happens to them; int32 [E, 2] old and new bits.

    a `[S, H, M, K]`, b `[S or 1, H, K, N]`, bias `[N]` in the accumulator's dtype, y `[S, H, M, N]` contiguous and in
    place. Not exact: y changes by the difference that each event makes to its partial sum. A sum that nothing
    changed keeps the value the library computed.
    """
    dtype = {torch.float64: torch.float64, torch.int8: torch.int32}.get(a.dtype, torch.float32)
    bits = torch.empty(len(events.rows), 2, dtype=torch.int32, device=a.device)
    for chunk in torch.arange(len(events.outputs), device=a.device).split(4096):  # 16 MB of products at K = 1024
        _accumulate(a, b, bias, y, table, events, exact, dtype, chunk, bits)
    return bits


def _accumulate(a, b, bias, y, table, events, exact, dtype, chunk, bits):  # type: ignore[no-untyped-def]
    (_, heads, m_size, k_size), n_size = a.shape, y.shape[-1]
    index = events.outputs[chunk]
    n, m = index % n_size, index // n_size % m_size
    h, s = index // (n_size * m_size) % heads, index // (n_size * m_size * heads)
    left, right = a[s, h, m].to(dtype), b[s if b.shape[0] > 1 else 0, h, :, n].to(dtype)
    offset = bias[n] if bias is not None else torch.zeros(len(chunk), dtype=dtype, device=a.device)
    if not exact:  # the library's own value, plus what the events change
        offset = y.view(-1)[index].to(dtype) - (left * right).sum(1, dtype=dtype)
    ranges = events.weight_starts[chunk]
    counts = ranges[:, 1] - ranges[:, 0]
    owner = torch.repeat_interleave(torch.arange(len(chunk), device=a.device), counts)
    place = torch.arange(len(owner), device=a.device) + (ranges[:, 0] - (counts.cumsum(0) - counts))[owner]
    right[owner, events.weight_k[place]] = events.weights[place].to(dtype)
    products = left * right
    position = torch.arange(k_size, device=a.device)
    total = torch.zeros(len(chunk), dtype=dtype, device=a.device)
    done, changed = torch.zeros_like(index), counts > 0
    start, end = events.starts[chunk], events.starts[chunk + 1]
    turn = start
    while True:
        active = turn < end
        last = torch.full_like(turn, k_size + 1)
        k = torch.where(active, events.k[torch.where(active, turn, 0)] if len(events.k) else last, last)
        between = (position >= done[:, None]) & (position < k[:, None])
        total = total + torch.where(between, products, 0).sum(1, dtype=dtype)
        total = torch.where((k > k_size) & (done <= k_size), total + offset, total)
        done = k
        if not active.any():
            break
        row, at = events.rows[turn[active]], active.nonzero()[:, 0]
        total[at], both = _one_word(total[at], table[row])
        bits[turn[active]] = both
        changed[at] |= both[:, 0] != both[:, 1]
        turn = turn + active.long()
    y.view(-1)[index[changed]] = total[changed].to(y.dtype)


def _one_word(values: torch.Tensor, sites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with one of their words replaced, and the word before and after."""
    size = values.element_size()
    words = values.contiguous().view(INTEGERS[size]).reshape(len(values), -1).clone()
    rows = torch.arange(len(values), device=values.device)
    column = (sites[:, 6] >> 16).long() if size == 8 else torch.zeros_like(rows)
    old = words[rows, column]
    words[rows, column] = new = word_values(old, sites[:, 4:6], size)
    return words.view(values.dtype).reshape(len(values)), torch.stack([old, new], 1).to(torch.int32)
