"""The n-gram against the formula written out with dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from rom.training.ngram import ngram_bits_per_byte


def slow_bits_per_byte(train, validation, order):
    counts = Counter(bytes(train[i : i + n + 1]) for n in range(order + 1) for i in range(len(train) - n))

    def probability(context, byte):
        shorter = 1 / 256 if not context else probability(context[1:], byte)
        if not context:
            following = {gram: count for gram, count in counts.items() if len(gram) == 1}
        else:
            following = {g: c for g, c in counts.items() if len(g) == len(context) + 1 and g[:-1] == context}
        total, types = sum(following.values()), len(following)
        if not total:
            return shorter
        return (following.get(context + bytes([byte]), 0) + types * shorter) / (total + types)

    bits = [
        -math.log2(probability(bytes(validation[max(i - order, 0) : i]), validation[i]))
        for i in range(1, len(validation))
    ]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_matches_the_formula(order):
    random = np.random.default_rng(order)
    text = random.choice(np.frombuffer(b"abcd", np.uint8), size=160, p=[0.5, 0.3, 0.15, 0.05])
    train, validation = text[:120], np.concatenate([text[120:], np.frombuffer(b"abz\xff\x00ab", np.uint8)])
    assert ngram_bits_per_byte(train, validation, order) == pytest.approx(
        slow_bits_per_byte(train, validation, order), rel=1e-12
    )


def test_probabilities_sum_to_one():
    train = np.frombuffer(b"abracadabra", np.uint8)
    total = sum(2 ** -ngram_bits_per_byte(train, np.array([ord("b"), byte], np.uint8), 3) for byte in range(256))
    assert total == pytest.approx(1)


def test_tiny_texts():
    one = np.array([7], np.uint8)
    assert ngram_bits_per_byte(one, np.array([7, 7], np.uint8)) == pytest.approx(-math.log2((1 + 1 / 256) / 2))
    with pytest.raises(ValueError, match="at least 2 bytes"):
        ngram_bits_per_byte(one, one)
    with pytest.raises(ValueError, match=r"order in 0\.\.7, got 8"):
        ngram_bits_per_byte(one, one, 8)
