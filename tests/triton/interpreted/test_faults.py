"""triton_kernels/faults.py in Triton's interpreter, against the CPU's kernels."""

import numpy as np
import pytest
import torch
from fault_cases import operands, some_sites
from rom.triton_kernels import faults as kernels
from tolerance import assert_close

import rom
from rom import faults
from rom.faults import ALL, Target

DTYPES = [torch.float32, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 8)


def both(function, *arguments, **options):
    """(on Triton, on the CPU), each (values, log)."""
    results = []
    for backend in ("triton", "cpu"):
        with rom.backend(backend):
            results.append(function(*arguments, **options))
    return results


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_target(dtype, mode):
    a, b, bias = operands(dtype)
    (y, log), (expected, expected_log) = both(rom.ops.faulty_matmul, a, b, some_sites(dtype), bias, mode=mode)
    assert_close("y", y, expected.double(), scale=2)
    assert torch.equal(log[:, 0], expected_log[:, 0])
    sums = torch.from_numpy(np.isin(some_sites(dtype)["target"], (Target.ACCUMULATOR, Target.BEFORE_CAST)))
    results = torch.from_numpy(some_sites(dtype)["target"] == Target.OUTPUT)
    # The words of operands are the operands' own; those of sums and results have the sums' rounding in them.
    assert torch.equal(log[~sums & ~results], expected_log[~sums & ~results])
    flipped = (log[:, 1] ^ log[:, 2])[sums | results]
    assert torch.equal(flipped, (expected_log[:, 1] ^ expected_log[:, 2])[sums | results])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.int32], ids=str)
def test_values_bit_for_bit(dtype):
    """Many sites on few words: each run of them is applied in the table's order."""
    x = (torch.randn(4, 3, 5) * 50).to(dtype)
    rng, n = np.random.default_rng(0), 60
    sites = faults.sites(
        Target.OUTPUT, (0, 0), rng.choice([0, 1, 3, 9, ALL], n), rng.integers(0, 3, n), rng.integers(0, 5, n)
    )
    sites["and_mask"], sites["xor_mask"] = rng.integers(0, 2**32, (2, n))
    sites["flags"] = rng.integers(0, 2, n) if dtype == torch.float64 else 0
    sites["target"][::7] = Target.A  # not of this operator
    (y, log), (expected, expected_log) = both(rom.ops.faulty_values, x, sites)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    assert torch.equal(y.view(bits), expected.view(bits)) and torch.equal(log, expected_log)


def test_rows_that_see_wrong_weights():
    """A weight wrong for one sample each, several in one column, and a shared one beside them."""
    a, b = torch.randn(6, 2, 70), torch.randn(70, 4)
    sites = faults.sites(
        Target.B, faults.flip(1 << 29), [0, 2, 2, 2, 5, ALL], 0, [1, 3, 3, 3, 0, 2], [69, 0, 33, 64, 7, 9]
    )
    (y, log), (expected, expected_log) = both(rom.ops.faulty_matmul, a, b, sites)
    assert_close("y", y, expected.double(), scale=2)
    assert torch.equal(log, expected_log)


def test_gradients():
    a, b, bias = (x.requires_grad_() for x in operands(torch.float32))
    sites, grad = some_sites(torch.float32), torch.randn(3, 2, 4)
    grads = []
    for backend in ("triton", "cpu"):
        with rom.backend(backend):
            y, _ = rom.ops.faulty_matmul(a, b, sites, bias, persistence="permanent")
            grads.append(torch.autograd.grad(y, (a, b, bias), grad))
    for name, g, e in zip(("a.grad", "b.grad", "bias.grad"), *grads):
        assert_close(name, g, e.double(), scale=2)


def test_places_that_are_not_there():
    site = faults.sites(Target.OUTPUT, faults.flip(1), sample=0, row=0, col=[1, 99])
    with rom.backend("triton"), pytest.raises(ValueError, match=r"col below 3.*col 99, k 0 in site 1"):
        rom.ops.faulty_values(torch.ones(2, 3), site)
