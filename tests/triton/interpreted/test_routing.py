"""Router, softmax, top-K and sort of triton_kernels/routing.py, in Triton's interpreter."""

import pytest
import torch
from rom.triton_kernels import routing as kernels
from tolerance import assert_close

import rom
from rom.reference import routing as reference

INTEGERS = ("indices", "counts", "offsets", "perm", "inv")


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    """Several spans of several tiles on few tokens."""
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "MAX_SPANS", 3)
    monkeypatch.setattr(kernels, "FEWEST_TOKENS", 4)


def on_triton(logits, *options):
    with rom.backend("triton"):
        return rom.ops.route(logits, *options)


@pytest.mark.parametrize("shape", [(0, 8, 2), (1, 8, 1), (7, 1, 1), (65, 5, 5), (70, 8, 1), (21, 40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_equals_the_cpu(shape, dtype):
    tokens, experts, top_k = shape
    logits = (torch.randn(tokens, experts) * 4).to(dtype)  # 16-bit logits tie often
    got, expected = on_triton(logits, top_k, False, 1.7), rom.ops.route(logits, top_k, False, 1.7)
    for name, g, e in zip(got._fields, got, expected):
        if name in INTEGERS:
            assert torch.equal(g, e), name
        elif dtype == torch.float64:
            torch.testing.assert_close(g, e, rtol=1e-14, atol=0)
        else:  # exponentials of both are within 1 ulp, so are their sums; the interpreter fuses no multiply-adds
            ulp = torch.nextafter(e, torch.full_like(e, 2.0)) - e
            assert not e.numel() or ((g - e).abs() / ulp).max() <= 5, name


def test_ties_and_what_is_no_number():
    inf, nan = float("inf"), float("nan")
    rows = [
        [0.0, -0.0, 0.0, -1.0],
        [-inf, -inf, -inf, -inf],
        [1, nan, 2, nan],
        [inf, 3, inf, 1],
        [-3.0, -2.0, -2.0, -9],
    ]
    logits = torch.tensor(rows)
    got, expected = on_triton(logits, 3), rom.ops.route(logits, 3)
    for name in INTEGERS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert torch.equal(got.probs.isnan(), expected.probs.isnan())
    assert got.indices[0].tolist() == [0, 1, 2] and got.indices[2].tolist() == [1, 3, 2]


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize):
    logits = torch.randn(37, 7, requires_grad=True)
    double = logits.detach().double().requires_grad_()
    routing = on_triton(logits, 3, normalize, 1.7)
    _, weights, *_, probs = reference.route(double, 3, normalize, 1.7)
    grads = torch.randn_like(routing.weights), torch.randn_like(routing.probs)
    for kept in ((0,), (1,), (0, 1)):
        outs, refs = [(routing.weights, routing.probs)[i] for i in kept], [(weights, probs)[i] for i in kept]
        (got,) = torch.autograd.grad(outs, logits, [grads[i] for i in kept], retain_graph=True)
        (expected,) = torch.autograd.grad(refs, double, [grads[i].double() for i in kept], retain_graph=True)
        assert_close(f"logits.grad through {kept}", got, expected)


def test_every_row_has_one_slot_when_all_go_to_one_expert():
    logits = torch.zeros(50, 6)
    logits[:, 4] = 9.0
    routing = on_triton(logits, 1)
    assert routing.counts.tolist() == [0, 0, 0, 0, 50, 0] and torch.equal(routing.perm, torch.arange(50).int())
