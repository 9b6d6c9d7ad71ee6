"""Bit error rates become lists of sites: K ~ Binomial(n, rate) per block of bits, then K of them without replacement.

So a rate plan is logged and replayed like any other, and costs what its faults cost: a rate of 1e-6 over 1e9 bits is a
thousand sites. Blocks are independent of each other, and all arithmetic is that of IEEE additions and products, whose
results are the same on every machine; `pow` and `log` are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rom.faults.permutation import permute
from rom.faults.philox import philox, split, uniform
from rom.faults.population import Stratum
from rom.faults.records import SITE

_STREAM = 3
_CHUNK = 1 << 20  # blocks at a time: 8 MB of uniforms


def compile_rate(strata: Sequence[Stratum], rate: float, seed: int, realisation: int) -> tuple[np.ndarray, np.ndarray]:
    """(stratum of each site, sites) of one realisation; several bits of a word are one record."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rom.faults: expected a rate of 0 to 1, got {rate}.")
    owners, tables = [], [np.zeros(0, SITE)]
    for number, stratum in enumerate(strata):
        low, high = philox(split(seed), (number, realisation, _STREAM, 0))[:2]
        own = int(low) | int(high) << 32
        records = _merge(stratum.sites(_bits(stratum.size, rate, own), realisation))
        owners.append(np.full(len(records), number, np.int32))
        tables.append(records)
    return np.concatenate([np.zeros(0, np.int32), *owners]), np.concatenate(tables)


def _bits(size: int, rate: float, seed: int) -> np.ndarray:
    """Which of `size` bits are hit, ascending."""
    block = 1 << 15 if rate <= 0.01 else 512  # the probability of no fault in a block stays above 1e-154
    full, last = divmod(size, block)
    parts = [
        _in_blocks(np.arange(start, min(start + _CHUNK, full)), block, block, rate, seed)
        for start in range(0, full, _CHUNK)
    ]
    if last:
        parts.append(_in_blocks(np.array([full]), block, last, rate, seed))
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))


def _in_blocks(blocks: np.ndarray, stride: int, size: int, rate: float, seed: int) -> np.ndarray:
    few = min(rate, 1 - rate)  # above 1/2 count the bits that stay
    low, high = split(blocks)
    counts = np.searchsorted(_distribution(size, few), uniform(split(seed), (low, high, _STREAM, 1)), side="right")
    if rate > few:
        counts = size - counts
    owner = np.repeat(np.arange(len(blocks)), counts)
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return blocks[owner].astype(np.uint64) * np.uint64(stride) + permute(size, seed, blocks[owner], rank)


def _distribution(size: int, rate: float) -> np.ndarray:
    """Cumulative probabilities of Binomial(size, rate) until they reach 1 within rounding."""
    probability, factor, power = 1.0, 1.0 - rate, size
    while power:  # (1 − rate)^size by squaring
        if power & 1:
            probability *= factor
        factor, power = factor * factor, power >> 1
    total, cumulative, odds = 0.0, [], rate / (1.0 - rate)
    for k in range(size):
        total += probability
        cumulative.append(total)
        if total >= 1.0 - 1e-15 and probability < 1e-18:
            break
        probability *= (size - k) / (k + 1) * odds
    return np.array(cumulative)


def _merge(records: np.ndarray) -> np.ndarray:
    """One record per word. Bits of a word are neighbours in a stratum's numbering."""
    if not len(records):
        return records
    names = ["sample", "row", "col", "k", "flags"]
    words = np.stack([records[name].astype(np.int64) for name in names])
    first = np.flatnonzero(np.r_[True, (words[:, 1:] != words[:, :-1]).any(0)])
    merged = records[first]
    merged["xor_mask"] = np.bitwise_or.reduceat(records["xor_mask"], first)
    merged["and_mask"] = np.bitwise_and.reduceat(records["and_mask"], first)
    return merged
