"""The model to beat: an order-n byte n-gram with interpolated Witten–Bell smoothing."""

from __future__ import annotations

import numpy as np

from rom.training.data import VOCABULARY


def ngram_bits_per_byte(train: np.ndarray, validation: np.ndarray, order: int = 4) -> float:
    """Bits per byte on `validation` of the n-gram counted on `train`.

        p_n(c | h) = (count(h c) + T(h) · p_{n-1}(c | h')) / (count(h) + T(h)),    p_{-1} = 1 / 256

    where h is the last n bytes, h' the last n − 1, and T(h) the number of different bytes seen after h. A context
    that was never seen passes the shorter context's probability on.

    Args:
        train, validation: `[N]` uint8.
        order: bytes of context, at most 7. The first bytes of `validation` have as much as there is.

    Returns:
        The mean of −log₂ p over all bytes but the first, which is what a model that reads the same bytes is scored on.

    Source: Witten and Bell, "The zero-frequency problem" (1991), method C, interpolated as in Chen and Goodman (1998).
    """
    if not 0 <= order <= 7:
        raise ValueError(f"ngram_bits_per_byte: expected an order in 0..7, got {order}.")
    probability = np.full(max(len(validation) - 1, 0), 1 / VOCABULARY)
    if not len(probability):
        raise ValueError("ngram_bits_per_byte: expected at least 2 bytes of validation text, got fewer.")
    for n in range(order + 1):
        scored = max(n - 1, 0)  # the first entries, of validation bytes 1.., whose context is shorter than n
        grams, counts = np.unique(_grams(train, n + 1), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        if not len(grams):
            break
        context_counts, distinct = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
        keys = _grams(validation, n + 1)[1 if n == 0 else 0 :]
        count = _look_up(grams, counts, keys)
        total = _look_up(contexts, context_counts, keys >> np.uint64(8))
        types = _look_up(contexts, distinct, keys >> np.uint64(8))
        shorter = probability[scored:]
        seen = total > 0
        shorter[seen] = (count[seen] + types[seen] * shorter[seen]) / (total[seen] + types[seen])
    return float(-np.log2(probability).mean())


def _grams(tokens: np.ndarray, length: int) -> np.ndarray:
    """`[N − length + 1]` uint64: every run of `length` bytes, the oldest byte the most significant."""
    grams = np.zeros(max(len(tokens) - length + 1, 0), dtype=np.uint64)
    for i in range(length):
        grams = grams << np.uint64(8) | tokens[i : i + len(grams)].astype(np.uint64)
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` at the `wanted` ones of the sorted `keys`, 0 where there is none."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
