"""A keyed bijection of [0, size): site i of a sample is the i-th image, so nothing is drawn twice and any i is O(1).

Below 256 it is a shuffle (Fisher and Yates). Above, a Feistel network over the bits of size − 1 with cycle walking: an
image outside [0, size) is mapped again, fewer than twice on average, until it is inside (Black and Rogaway 2002).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from rom.faults.philox import below, philox, split

SHUFFLE_BELOW = 256
MAX_SIZE = 1 << 62
ROUNDS = 12  # alternating halves: six for each, well past the four of the Luby-Rackoff proof
_PERMUTATION_STREAM, _SHUFFLE_STREAM = 1, 2  # counters of the two uses never meet


def permute(size: int, seed: int, stream: Any, index: Any) -> np.ndarray:
    """Images of `index` (uint64, below `size`) under the permutation of (seed, stream), both of 64 bits.

    `stream` may be an array: each index then goes through a permutation of its own.
    """
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"rom.faults: expected a population of 1 to 2**62 sites, got {size}.")
    index, stream = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(stream, np.uint64))
    if index.size and int(index.max()) >= size:
        raise ValueError(f"rom.faults: expected site numbers below the population's {size}, got {int(index.max())}.")
    if size < SHUFFLE_BELOW:
        streams, which = np.unique(stream, return_inverse=True)
        tables = np.array([_shuffle(size, seed, int(s)) for s in streams], np.uint64).reshape(-1, size)
        return tables[which.reshape(index.shape), index.astype(np.int64)]
    keys = _round_keys(seed, stream)
    image, outside = index.copy(), np.ones(index.shape, bool)
    while outside.any():
        image[outside] = _feistel(image[outside], (size - 1).bit_length(), keys[:, outside])
        outside = image >= np.uint64(size)
    return image


@lru_cache(maxsize=1024)
def _shuffle(size: int, seed: int, stream: int) -> tuple[int, ...]:
    key = philox(split(seed), (*split(stream), _SHUFFLE_STREAM, 0))[:2]
    values = list(range(size))
    others = below(np.arange(size, 1, -1), (key[0], key[1]), _SHUFFLE_STREAM).tolist()
    for last, other in zip(range(size - 1, 0, -1), others):
        values[last], values[other] = values[other], values[last]
    return tuple(values)


def _round_keys(seed: int, stream: np.ndarray) -> np.ndarray:
    low, high = split(stream)
    blocks = [philox(split(seed), (low, high, _PERMUTATION_STREAM, block)) for block in range(ROUNDS // 4)]
    return np.concatenate(blocks)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass. A round adds a function of one part to the other, which can be undone: the whole is a bijection."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = x & low_mask, x >> np.uint64(low_bits)
    for number, key in enumerate(keys):
        if number % 2:
            high = high ^ (_mix(low, key) & high_mask)
        else:
            low = low ^ (_mix(high, key) & low_mask)
    return high << np.uint64(low_bits) | low


def _mix(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 over a keyed word: every bit of x and key reaches every bit of the result."""
    with np.errstate(over="ignore"):
        h = x.astype(np.uint32) ^ key
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return (h ^ (h >> np.uint32(16)) ^ key).astype(np.uint64)
