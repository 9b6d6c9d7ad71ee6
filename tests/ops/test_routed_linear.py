import importlib
import itertools

import pytest
import torch
from tolerance import assert_close

import rom
from rom.reference import routing as reference

ORDERS = list(itertools.product(("token", "expert"), ("token", "expert")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("out", "x.grad", "weight.grad", "bias.grad", "weights.grad")


def make(
    tokens, experts, top_k, dtype=torch.float32, rows_in="token", bias=True, sizes=(12, 20), device="cpu", logits=None
):
    """x, weight, bias and a routing whose weights are a leaf, so that their gradient can be asked for."""
    inputs, outputs = sizes
    logits = torch.randn(tokens, experts, device=device) if logits is None else logits
    routing = rom.ops.route(logits, top_k)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    routing = routing._replace(weights=routing.weights.detach().to(wide).requires_grad_())
    rows = tokens if rows_in == "token" else tokens * top_k
    x = torch.randn(rows, inputs, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(experts, outputs, inputs, device=device) / inputs**0.5).to(dtype).requires_grad_()
    offset = torch.randn(experts, outputs, device=device).to(dtype).requires_grad_() if bias else None
    return x, weight, routing, offset


def run(function, x, weight, routing, bias, weighted, rows_in, rows_out, grad):
    out = function(x, weight, routing, bias, weighted, rows_in, rows_out)
    inputs = [x, weight] + ([bias] if bias is not None else []) + ([routing.weights] if weighted else [])
    grads = iter(torch.autograd.grad(out, inputs, grad.to(out.dtype)))
    results = [out, next(grads), next(grads)]
    return [*results, next(grads) if bias is not None else None, next(grads) if weighted else None]


def compare(x, weight, routing, bias, weighted, rows_in, rows_out):
    rows = routing.num_tokens * (1 if rows_out == "token" else routing.top_k)
    grad = torch.randn(rows, weight.shape[1], device=x.device).to(x.dtype)
    options = weighted, rows_in, rows_out
    double = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, routing.weights)]
    exact = routing._replace(weights=double[3])
    expected = run(reference.routed_linear, *double[:2], exact, double[2], *options, grad.double())
    got = run(rom.ops.routed_linear, x, weight, routing, bias, *options, grad)
    for name, g, e, t in zip(NAMES, got, expected, (x, x, weight, bias, routing.weights)):
        if g is not None:
            assert g.dtype == t.dtype, name
            # Two roundings in 16 bits: of the product of a row, then of the result it goes into.
            low = x.dtype in (torch.bfloat16, torch.float16)
            assert_close(name, g, e, scale=3.0 if low else 1.0, dtype=x.dtype if low else None)
    return got


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rows", ORDERS, ids="-".join)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_every_combination(top_k, rows, weighted, bias, device):
    rows_in, _ = rows
    compare(*make(67, 5, top_k, rows_in=rows_in, bias=bias, device=device), weighted, *rows)


@pytest.mark.parametrize("rows", ORDERS, ids="-".join)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(dtype, top_k, rows, device):
    compare(*make(33, 4, top_k, dtype, rows[0], device=device), True, *rows)


@pytest.mark.parametrize("sizes", [(12, 20), (1, 1), (7, 33)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17, 4099])
def test_sizes(tokens, sizes):
    compare(*make(tokens, 8, 2, sizes=sizes), True, "token", "token")
    compare(*make(tokens, 8, 1, sizes=sizes), False, "token", "expert")


def test_empty_experts_get_zero_gradients():
    logits = torch.full((40, 6), -9.0)
    logits[:, 2] = 9.0  # everything to one expert
    x, weight, routing, bias = make(40, 6, 1, logits=logits)
    _, _, grad_weight, grad_bias, _ = compare(x, weight, routing, bias, True, "token", "token")
    others = [0, 1, 3, 4, 5]
    assert not grad_weight[others].any() and not grad_bias[others].any() and grad_weight[2].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_expert_is_a_plain_linear(weighted, bias):
    x, weight, routing, offset = make(21, 1, 1, bias=bias)
    plain = torch.nn.functional.linear(x, weight[0], None if offset is None else offset[0])
    for rows in ORDERS:
        assert torch.equal(rom.ops.routed_linear(x, weight, routing, offset, weighted, *rows), plain)
    compare(x, weight, routing, offset, weighted, "token", "token")


def test_all_experts_with_zero_logits_is_the_sum_of_the_matrices():
    x, weight, routing, _ = make(30, 4, 4, torch.float64, logits=torch.zeros(30, 4, dtype=torch.float64))
    assert_close("sum", rom.ops.routed_linear(x, weight, routing), x @ weight.sum(0).mT)
    assert_close("mean", rom.ops.routed_linear(x, weight, routing, weighted=True), x @ weight.mean(0).mT)


def test_two_projections_in_expert_order_are_two_in_token_order():
    x, first, routing, _ = make(50, 5, 2, torch.float64)
    second = torch.randn(5, 9, 20, dtype=torch.float64)
    rows = rom.ops.routed_linear(x, first, routing, rows_out="expert")
    got = rom.ops.routed_linear(rows, second, routing, weighted=True, rows_in="expert")
    each = torch.einsum("ti,eoi,ero->ter", x, first, second)
    chosen = each.gather(1, routing.indices.long()[:, :, None].expand(-1, -1, 9))
    assert_close("out", got, (chosen * routing.weights[:, :, None]).sum(1))


def test_the_order_of_the_tokens_does_not_matter():
    x, weight, _, bias = make(60, 6, 2, torch.float64)
    logits, shuffle = torch.randn(60, 6, dtype=torch.float64), torch.randperm(60)
    got = rom.ops.routed_linear(x[shuffle], weight, rom.ops.route(logits[shuffle], 2), bias, weighted=True)
    assert_close("out", got, rom.ops.routed_linear(x, weight, rom.ops.route(logits, 2), bias, weighted=True)[shuffle])


@pytest.mark.parametrize("rows", ORDERS, ids="-".join)
def test_gradcheck_with_the_router(rows):
    logits = torch.randn(6, 4, dtype=torch.float64).mul_(3).requires_grad_()
    x, weight, _, bias = make(6, 4, 2, torch.float64, rows[0], sizes=(3, 2))

    def function(logits, x, weight, bias):
        return rom.ops.routed_linear(x, weight, rom.ops.route(logits, 2), bias, True, *rows)

    with rom.backend("cpu"):
        assert torch.autograd.gradcheck(function, (logits, x, weight, bias))


def test_double_backward_goes_through_the_reference():
    logits = torch.randn(4, 3, dtype=torch.float64).mul_(3).requires_grad_()
    x, weight, _, _ = make(4, 3, 2, torch.float64, sizes=(2, 2))

    def function(logits, x, weight):
        return rom.ops.routed_linear(x, weight, rom.ops.route(logits, 2), weighted=True)

    with rom.backend("reference"):
        assert torch.autograd.gradgradcheck(function, (logits, x, weight))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weights"])
def test_frozen_inputs_get_no_gradient(frozen):
    x, weight, routing, bias = make(19, 4, 2)
    grad = torch.randn(19, 20)
    inputs = dict(zip(("x", "weight", "bias", "weights"), (x, weight, bias, routing.weights)))
    out = rom.ops.routed_linear(x, weight, routing, bias, weighted=True)
    expected = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad)))
    inputs[frozen].requires_grad_(False)
    rom.ops.routed_linear(x, weight, routing, bias, weighted=True).backward(grad)
    assert all(t.grad is None if name == frozen else torch.equal(t.grad, expected[name]) for name, t in inputs.items())


def test_non_contiguous_inputs():
    _, _, routing, _ = make(31, 4, 2)
    x, weight = torch.randn(24, 31).t()[:, ::2], torch.randn(20, 4, 12).transpose(0, 1)
    bias = torch.randn(20, 4).t()
    got = rom.ops.routed_linear(x, weight, routing, bias)
    assert_close("out", got, reference.routed_linear(x.double(), weight.double(), routing, bias.double()))
    x.requires_grad_()
    rom.ops.routed_linear(x, weight, routing, bias).sum().backward()  # a gradient with strides 0
    assert torch.isfinite(x.grad).all()


def test_deterministic_whatever_the_thread_count():
    x, weight, routing, bias = make(2000, 8, 2, sizes=(64, 96))
    grad, runs = torch.randn(2000, 96), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(run(rom.ops.routed_linear, x, weight, routing, bias, True, "token", "token", grad))
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2]))
    for name, one, two in zip(NAMES, runs[0], runs[1]):  # the library may split a GEMM otherwise
        assert_close(name, two, one.double())


@pytest.mark.parametrize("weighted, rows", [(True, ("token", "token")), (False, ("expert", "expert"))])
def test_opcheck(weighted, rows):
    x, weight, routing, bias = make(9, 3, 2, rows_in=rows[0], bias=weighted)
    weights = routing.weights if weighted else None
    order = routing.offsets, routing.perm, routing.inv
    torch.library.opcheck(torch.ops.rom.routed_linear.default, (x, weight, bias, weights, *order, *rows, "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile(backend):
    x, weight, _, bias = make(14, 4, 2)
    logits = torch.randn(14, 4, requires_grad=True)

    def loss(logits, x, weight, bias):
        routing = rom.ops.route(logits, 2)
        hidden = rom.ops.routed_linear(x, weight, routing, bias, rows_out="expert").sin()
        return rom.ops.routed_linear(hidden, weight.mT, routing, weighted=True, rows_in="expert").square().sum()

    inputs = logits, x, weight, bias
    expected = torch.autograd.grad(loss(*inputs), inputs)
    with rom.backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*inputs), inputs)
    for name, g, e in zip(("logits", "x", "weight", "bias"), got, expected):
        assert_close(name, g, e)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, logits, x, weight):
            return rom.ops.routed_linear(x, weight, rom.ops.route(logits, 2))

    tokens = torch.export.Dim("tokens")
    weight = torch.randn(4, 20, 12)
    arguments = torch.randn(14, 4), torch.randn(14, 12), weight
    program = torch.export.export(Module(), arguments, dynamic_shapes=({0: tokens}, {0: tokens}, None))
    assert "rom.routed_linear" in str(program.graph)
    other = torch.randn(23, 4), torch.randn(23, 12), weight
    assert torch.equal(program.module()(*other), Module()(*other))


@pytest.mark.parametrize("experts", [1, 4])
def test_autocast_casts_all_but_the_routing_weights(experts):
    x, weight, routing, bias = make(15, experts, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rom.ops.routed_linear(x, weight, routing, bias, weighted=True)
    low = [t.bfloat16() for t in (x, weight, bias)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rom.ops.routed_linear(low[0], low[1], routing, low[2], weighted=True))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias, routing.weights))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x": torch.ones(5, 3)},
            ValueError,
            "expected x for the routing's 6 tokens, got x of 5 rows. A routing belongs to",
        ),
        (
            {"x": torch.ones(6, 3), "rows_in": "expert"},
            ValueError,
            "expected x for the routing's 6 tokens × top_k 2 rows in expert order, got x of 6 rows",
        ),
        ({"x": torch.ones(2, 3, 3)}, ValueError, r"x of shape \(rows, in_features\), got \(2, 3, 3\). Flatten"),
        (
            {"x": torch.ones(6, 3).double()},
            TypeError,
            "expected weight of dtype torch.float64 like x, got torch.float32",
        ),
        ({"x": torch.ones(6, 3).int()}, TypeError, "expected x of dtype float32"),
        ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
        ({"x": torch.ones(6, 3, device="meta")}, ValueError, "expected weight on meta like x, got cpu"),
        (
            {"weight": torch.ones(5, 7, 3)},
            ValueError,
            r"weight of shape \(4 experts, out_features, 3 in_features\), got",
        ),
        ({"weight": torch.ones(4, 7, 2)}, ValueError, r"3 in_features\), got \(4, 7, 2\)"),
        ({"weight": torch.ones(7, 3)}, ValueError, r"3 in_features\), got \(7, 3\)"),
        ({"bias": torch.ones(7)}, ValueError, r"expected bias of shape \(4, 7\), got \(7,\)"),
        (
            {"bias": torch.ones(4, 7).half()},
            TypeError,
            "expected bias of dtype torch.float32 like x, got torch.float16",
        ),
        ({"routing": (1, 2)}, TypeError, "expected routing to be a rom.Routing, got tuple"),
        ({"rows_in": "tokens"}, ValueError, 'expected rows_in "token" or "expert", got \'tokens\''),
        ({"rows_out": "rows"}, ValueError, 'expected rows_out "token" or "expert", got \'rows\''),
    ],
)
def test_errors(change, error, message):
    routing = rom.ops.route(torch.randn(6, 4), 2)
    arguments = {"x": torch.ones(6, 3), "weight": torch.ones(4, 7, 3), "routing": routing} | change
    with pytest.raises(error, match=message):
        rom.ops.routed_linear(**arguments)


def test_docstring_example(run_doctests):
    run_doctests(importlib.import_module("rom.ops.routed_linear"))
