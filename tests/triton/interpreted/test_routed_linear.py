"""Products over expert segments of triton_kernels/routed_linear.py, in Triton's interpreter."""

import itertools

import pytest
import torch
from rom.triton_kernels import gemm
from rom.triton_kernels import routed_linear as kernels
from tolerance import assert_close

import rom
from rom.reference import routing as reference

E, IN, OUT = 4, 24, 40  # of no tile, but rows of 16-byte multiples, as TMA wants them
NAMES = ("out", "x.grad", "weight.grad", "bias.grad", "weights.grad")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles of few rows, in bands."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
    kept = {kind: row | tile for kind, row in kernels.TILES.items()}
    monkeypatch.setattr(kernels, "TILES", kept)
    monkeypatch.setattr(kernels, "GROUP_M", 2)


def routing_of(tokens, top_k, kind):
    """Experts drawn at random; two of them without tokens; all tokens to one."""
    logits = torch.randn(tokens, E)
    if kind == "empty":
        logits[:, [0, 2]] = -9.0
    elif kind == "one":
        logits += torch.arange(E) * 9.0
    return rom.ops.route(logits, top_k)


def results(function, x, weight, routing, bias, grad, **options):
    """The result and every gradient."""
    inputs = [t for t in (x, weight, bias) if t is not None]
    weights = routing.weights.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inputs = [t.detach().requires_grad_() for t in inputs]
    weights.requires_grad_(options["weighted"])
    out = function(inputs[0], inputs[1], routing._replace(weights=weights), *inputs[2:], **options)
    inputs += [weights] if options["weighted"] else []
    return [out, *torch.autograd.grad(out, inputs, grad[: len(out)].to(out.dtype))]


def compare(dtype, tokens, top_k, kind, rows_in, rows_out, weighted, with_bias):
    options = {"weighted": weighted, "rows_in": rows_in, "rows_out": rows_out}
    routing = routing_of(tokens, top_k, kind)
    x = torch.randn(tokens * (top_k if rows_in == "expert" else 1), IN).to(dtype)
    weight, bias = (torch.randn(E, OUT, IN) / IN**0.5).to(dtype), torch.randn(E, OUT).to(dtype) if with_bias else None
    grad = torch.randn(tokens * top_k, OUT).to(dtype)
    with rom.backend("triton"):
        got = results(rom.ops.routed_linear, x, weight, routing, bias, grad, **options)
    plain = results(reference.routed_linear, x, weight, routing, bias, grad, **options)
    in64 = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    expected = results(reference.routed_linear, *in64[:2], routing, *in64[2:], **options)
    names = [name for name in NAMES if (weighted or name != "weights.grad") and (with_bias or name != "bias.grad")]
    assert len(got) == len(names)
    for name, g, e, p in zip(names, got, expected, plain):
        assert_close(name, g, e, p, dtype=dtype)


@pytest.mark.parametrize("rows_in, rows_out", itertools.product(("token", "expert"), repeat=2))
@pytest.mark.parametrize(
    "top_k, weighted, with_bias", [(1, False, False), (1, True, True), (2, True, False), (2, False, True)]
)
def test_matches_float64(rows_in, rows_out, top_k, weighted, with_bias):
    compare(torch.float32, 21, top_k, "random", rows_in, rows_out, weighted, with_bias)


@pytest.mark.parametrize("kind", ["empty", "one"])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_experts_without_rows(kind, tokens):
    compare(torch.float32, tokens, 1, kind, "expert", "token", True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    compare(dtype, 18, 2, "random", "token", "token", True, True)


def test_tensor_descriptors(monkeypatch):
    """What TMA would read: tiles that begin in one expert's rows and end in the next one's."""
    monkeypatch.setattr(gemm, "takes_tma", lambda *tensors: all(t.numel() for t in tensors))
    for top_k, rows_in, rows_out in ((1, "expert", "token"), (2, "token", "expert"), (1, "expert", "expert")):
        compare(torch.float32, 21, top_k, "empty", rows_in, rows_out, True, False)


def test_a_neighbours_infinity_stays_there():
    routing = rom.ops.route(torch.eye(2).repeat_interleave(20, 0) * 9, 1)
    x, weight = torch.randn(40, IN), torch.randn(2, OUT, IN)
    x[20:] = float("inf")
    grad = torch.randn(40, OUT)
    with rom.backend("triton"):
        out, grad_x, grad_weight = results(
            rom.ops.routed_linear, x, weight, routing, None, grad, weighted=False, rows_in="expert", rows_out="expert"
        )
    assert out[:20].isfinite().all() and grad_weight[0].isfinite().all() and grad_x.isfinite().all()


def test_reruns_are_bit_identical():
    routing = routing_of(18, 2, "random")
    x, weight, grad = torch.randn(18, IN), torch.randn(E, OUT, IN), torch.randn(36, OUT)
    options = {"weighted": True, "rows_in": "token", "rows_out": "token"}
    with rom.backend("triton"):
        runs = [results(rom.ops.routed_linear, x, weight, routing, None, grad, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_weight_without_elements_is_refused():
    with rom.backend("triton"), pytest.raises(rom.BackendError, match="the weight has no elements"):
        rom.ops.routed_linear(torch.randn(4, 0), torch.randn(E, OUT, 0), routing_of(4, 1, "random"))
