"""The GPU's scan cases, on the CPU: the slices by which results are judged, and the cases around them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate")
SHAPE = (2, 100, 12, 4)


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))


@pytest.fixture
def gpu(monkeypatch):
    module = importlib.import_module("scan_gpu")
    monkeypatch.setattr(module, "BACKENDS", {"rom cpu": "cpu", "rom cuda": "cuda"})
    return module


def problem(dtype=torch.float64):
    return importlib.import_module("scan_peers").Problem.random(SHAPE, dtype, "cpu")


def test_the_slices_are_those_of_the_whole_result(gpu):
    given = problem()
    out, *gradients = importlib.import_module("scan_peers").reference(given, True)
    (forward,) = gpu.seen_forward(given, (out,))
    torch.testing.assert_close(gpu.expected_forward(given)[0], forward)
    backward = gpu.expected_backward(given)
    seen = gpu.seen_backward(given, gradients)
    assert len(backward) == len(seen) == 8
    for expected, got in zip(backward, seen):
        torch.testing.assert_close(expected, got)


def test_doubling_is_the_loop_at_lengths_that_are_no_power_of_two(gpu):
    peers = importlib.import_module("scan_peers")
    for length in (1, 2, 7, 64, 65):
        given = problem().truncated(length)
        torch.testing.assert_close(gpu.by_doubling(**given.arguments), peers.unbind_loop(**given.arguments))


def run(case):
    harness, machine = importlib.import_module("harness"), importlib.import_module("machine")
    options = harness.parse(harness.arguments("test"), ["--device", "cpu", "--quick", "--seconds", "0.02"])
    return harness.Benchmark("test", options, machine.Peak(1e10, 1e9, 1e10)).run(case)


@pytest.mark.parametrize("backward", [False, True])
def test_sequences(gpu, backward):
    ours, missing, mamba = run(gpu.sequence(SHAPE, torch.float32, backward, "cpu"))
    assert ours.contender == "rom cpu" and ours.median > 0 and ours.error < 1e-4 and ours.fraction > 0
    assert missing.contender == "rom cuda" and missing.note.startswith("missing: ")
    assert "build_peers.py" in mamba.note


def test_decode(gpu):
    ours, *missing = run(gpu.decode((2, 24, 4), torch.float32, "cpu", graph=False))
    assert ours.contender == "rom cpu" and ours.error < 1e-5 and ours.median > 0
    assert all(row.note.startswith("missing") for row in missing)


def test_mamba_ssm_is_called_in_its_own_layout(gpu, monkeypatch):
    """A module in its place computes by the loop; shapes, arguments and results in the order of its source."""
    peers = importlib.import_module("scan_peers")
    module = type("selective_scan_cuda", (), {})

    def to_ours(u, delta, A, B, C, D, z, delta_bias):
        assert B.shape == (2, 1, 4, 100) and u.shape == (2, 12, 100) and u.is_contiguous()
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B[:, 0], C[:, 0], z))
        return u, delta, A, B, C, D, z, delta_bias

    def fwd(*arguments):
        *inputs, softplus = arguments
        assert softplus is True
        out = peers.unbind_loop(*to_ours(*inputs)).transpose(1, 2)
        return out, torch.zeros(()), out

    def bwd(*arguments):
        *inputs, grad, _states, _out, dz, softplus, recompute = arguments
        assert (dz, softplus, recompute) == (None, True, False)
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            result = peers.unbind_loop(*to_ours(*leaves)).transpose(1, 2)
        du, ddelta, dA, dB, dC, dD, dz, dbias = torch.autograd.grad(result, leaves, grad)
        return [du, ddelta, dA, dB, dC, dD, dbias, dz]

    module.fwd, module.bwd = staticmethod(fwd), staticmethod(bwd)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
    monkeypatch.setattr(peers, "_missing", lambda name, remedy: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for backward in (False, True):
        case = gpu.sequence(SHAPE, torch.float32, backward, "cpu")
        mamba = next(entry for entry in case.contenders if entry.name == "mamba_ssm")
        results = mamba.canonical(mamba.make()())
        for got, expected in zip(results, case.reference()):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_floors_are_those_of_the_published_table(gpu):
    """At 1.83 GHz, 132 processors and 4.3 TB/s, ms: memory and MUFU as the design counts them."""
    machine = importlib.import_module("machine")
    slots = 128 * 132 * 1.83e9
    peak = machine.Peak(slots, slots / 8, 4.3e12)
    shape = (8, 2048, 4096, 16)
    forward = gpu.cost(shape, torch.bfloat16, False).floors(peak, "cuda")
    backward = gpu.cost(shape, torch.bfloat16, True).floors(peak, "cuda")
    assert forward["memory"] == pytest.approx(0.125e-3, rel=0.01)
    assert forward["MUFU"] == pytest.approx(0.295e-3, rel=0.01)
    assert backward["memory"] == pytest.approx(0.25e-3, rel=0.01)
    assert backward["MUFU"] == pytest.approx(0.365e-3, rel=0.01)
    assert backward["issue"] == pytest.approx(0.72e-3, rel=0.01)
