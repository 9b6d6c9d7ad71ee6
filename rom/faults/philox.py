"""Philox4x32-10: random numbers as a function of (key, counter), the same wherever and in any order.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> np.ndarray:
    """Four uint32 per counter, `[4, ...]`; key and counter words are uint32, broadcast against each other."""
    k0, k1 = (np.asarray(word, np.uint32) for word in key)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint32) for word in counter))
    with np.errstate(over="ignore"):  # the key's Weyl sequence wraps
        for _ in range(10):
            left, right = (m * c.astype(np.uint64) for m, c in zip(_MULTIPLIERS, (c0, c2)))
            c0 = (right >> _HALF).astype(np.uint32) ^ c1 ^ k0
            c2 = (left >> _HALF).astype(np.uint32) ^ c3 ^ k1
            c1, c3 = (right & _LOW).astype(np.uint32), (left & _LOW).astype(np.uint32)
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def split(value: Any) -> tuple[np.ndarray, np.ndarray]:
    """The low and high word of uint64 values."""
    wide = np.asarray(value, np.uint64)
    return (wide & _LOW).astype(np.uint32), (wide >> _HALF).astype(np.uint32)


def uniform(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> np.ndarray:
    """A float64 of 53 random bits in [0, 1) per counter."""
    low, high = philox(key, counter)[:2].astype(np.uint64)
    return ((high << _HALF | low) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(bounds: Any, key: tuple[Any, Any], stream: int) -> np.ndarray:
    """An integer in [0, bound) per bound (uint32), all of exactly the same probability: never `%` (Lemire 2019)."""
    bounds = np.asarray(bounds, np.uint64)
    drawn = np.zeros(bounds.shape, np.int64)
    pending = np.arange(bounds.size)
    attempt = 0
    while pending.size:
        product = philox(key, (pending, attempt, stream, 0))[0].astype(np.uint64) * bounds[pending]
        accepted = (product & _LOW) >= np.uint64(1 << 32) % bounds[pending]
        drawn[pending[accepted]] = (product[accepted] >> _HALF).astype(np.int64)
        pending, attempt = pending[~accepted], attempt + 1
    return drawn
