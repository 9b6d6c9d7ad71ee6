"""Philox and the keyed permutation.

Statistical tests have a fixed seed, so they pass or fail for good; their thresholds are those at which one seed in a
million would fail with a perfect generator.
"""

import numpy as np
import pytest

from rom.faults import philox as rng
from rom.faults.permutation import permute


def chi_square_limit(degrees, z=4.7534):  # the quantile of 1e-6, after Wilson and Hilferty
    return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # kat_vectors of Random123 1.14
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert rng.philox(key, counter).tolist() == expected


def test_philox_is_vectorised_over_counters():
    whole = rng.philox((1, 2), (np.arange(5), 0, 3, 4))
    assert all((whole[:, i] == rng.philox((1, 2), (i, 0, 3, 4))).all() for i in range(5))


def test_uniform_is_uniform():
    values = rng.uniform((1, 2), (np.arange(100_000), 0, 0, 0))
    assert values.min() >= 0 and values.max() < 1
    assert chi_square(np.bincount((values * 64).astype(int), minlength=64)) < chi_square_limit(63)


def test_below_is_exact():
    counts = np.bincount(rng.below(np.full(70_000, 7), (5, 6), 0), minlength=7)
    assert len(counts) == 7 and chi_square(counts) < chi_square_limit(6)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 255, 256, 257, 1000, 4096, 65537, 100_003])
def test_permutation_is_a_bijection(size):
    image = permute(size, seed=3, stream=9, index=np.arange(size))
    assert (np.sort(image) == np.arange(size)).all()
    if size > 250:
        assert (image != permute(size, seed=4, stream=9, index=np.arange(size))).any()
        assert (image != permute(size, seed=3, stream=8, index=np.arange(size))).any()


def test_huge_populations_and_random_access():
    size = (1 << 62) - 57
    some = permute(size, 1, 2, np.array([0, 5, size - 1], np.uint64))
    assert len(set(some.tolist())) == 3 and int(some.max()) < size
    assert permute(size, 1, 2, 5) == some[1]
    with pytest.raises(ValueError, match="population"):
        permute((1 << 62) + 1, 1, 2, 0)
    with pytest.raises(ValueError, match="below the population's 10, got 10"):
        permute(10, 1, 2, 10)


@pytest.mark.parametrize("size, keys", [(20, 4000), (300, 60_000)])
def test_first_sites_are_uniform_over_the_keys(size, keys):
    keys = np.arange(keys)
    first, second = (permute(size, 11, keys, i).astype(int) for i in (0, 1))
    assert chi_square(np.bincount(first, minlength=size)) < chi_square_limit(size - 1)
    assert chi_square(np.bincount(second, minlength=size)) < chi_square_limit(size - 1)
    gaps = np.bincount((second - first) % size, minlength=size)[1:]  # every ordered pair is as likely as any other
    assert chi_square(gaps) < chi_square_limit(size - 2)


def test_consecutive_sites_are_spread():
    image = permute(1_000_003, 5, 0, np.arange(100_000)).astype(np.int64)
    assert chi_square(np.bincount(image * 100 // 1_000_003, minlength=100)) < chi_square_limit(99)
    steps = np.diff(image) % 1_000_003
    assert chi_square(np.bincount(steps * 100 // 1_000_003, minlength=100)) < chi_square_limit(99)
