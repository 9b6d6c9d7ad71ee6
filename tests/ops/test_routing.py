import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.ops import routing as module
from rom.reference import routing as reference

INTEGERS = ("indices", "counts", "offsets", "perm", "inv")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (0, 8, 2),
    (1, 8, 1),
    (17, 4, 1),
    (17, 5, 5),
    (4099, 8, 1),
    (513, 8, 2),
    (1030, 256, 8),
    (33, 1, 1),
    (9, 300, 3),
]


def check_invariants(routing, tokens, experts, top_k):
    """Everything the kernels behind the router rely on."""
    assert (routing.num_tokens, routing.num_experts, routing.top_k) == (tokens, experts, top_k)
    assert all(getattr(routing, name).dtype == torch.int32 for name in INTEGERS)
    slots = torch.arange(tokens * top_k, device=routing.perm.device)
    perm, inv, expert = routing.perm.long(), routing.inv.flatten().long(), routing.indices.flatten()
    assert torch.equal(perm.sort().values, slots) and torch.equal(inv[perm], slots)
    assert torch.equal(routing.counts.long(), torch.bincount(expert, minlength=experts))
    assert routing.offsets.tolist() == [0, *routing.counts.cumsum(0).tolist()]
    key = expert[perm].long() * len(slots) + perm  # sorted by expert, then by slot
    assert (key.diff() > 0).all()
    assert all(len(set(row)) == top_k for row in routing.indices.tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_the_reference(shape, dtype, device):
    tokens, experts, top_k = shape
    logits = torch.randn(tokens, experts, device=device).to(dtype)  # 16-bit logits tie often
    got, expected = rom.ops.route(logits, top_k), reference.route(logits, top_k)
    check_invariants(got, *shape)
    for name, e in zip(got._fields, expected):
        g = getattr(got, name)
        if name in INTEGERS:
            assert torch.equal(g, e), name
        else:
            assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(name, g, e.double())
    assert_close("probs", got.probs, logits.double().softmax(-1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradients(dtype, normalize, device):
    logits = torch.randn(65, 7, device=device).to(dtype).requires_grad_()
    double = logits.detach().double().requires_grad_()
    routing = rom.ops.route(logits, 3, normalize, 1.7)
    _, weights, *_, probs = reference.route(double, 3, normalize, 1.7)
    grads = [
        torch.randn(t.shape, dtype=torch.float64, device=device).to(t.dtype) for t in (routing.weights, routing.probs)
    ]
    for kept in ((0,), (1,), (0, 1)):  # through the weights, the probabilities, both
        outs, refs = [(routing.weights, routing.probs)[i] for i in kept], [(weights, probs)[i] for i in kept]
        given = [grads[i] for i in kept]
        (got,) = torch.autograd.grad(outs, logits, given, retain_graph=True)
        (expected,) = torch.autograd.grad(refs, double, [g.double() for g in given], retain_graph=True)
        assert got.dtype == dtype
        assert_close(f"logits.grad through {kept}", got, expected)


@settings(max_examples=40)
@given(tokens=st.integers(0, 40), experts=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**31))
def test_any_shape(tokens, experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    logits = torch.randint(-3, 3, (tokens, experts)).float()  # mostly ties
    routing = rom.ops.route(logits, top_k)
    check_invariants(routing, tokens, experts, top_k)
    assert torch.equal(routing.indices, reference.route(logits, top_k)[0])


def test_ties_go_to_the_lower_index():
    assert rom.ops.route(torch.zeros(3, 5), 3).indices.tolist() == [[0, 1, 2]] * 3
    close = torch.tensor([[1.0, 1.0 + 2.0**-23]])  # their softmax is the same float, the logits are not
    assert rom.ops.route(close, 1).indices.item() == 1


def test_top_k_of_all_experts_with_zero_logits_is_even():
    routing = rom.ops.route(torch.zeros(6, 4), 4)
    assert (routing.weights == 0.25).all() and routing.counts.tolist() == [6] * 4


def test_one_expert_has_weight_one():
    routing = rom.ops.route(torch.randn(9, 1), 1, routed_scale=2.5)
    assert (routing.weights == 2.5).all() and torch.equal(routing.perm, torch.arange(9, dtype=torch.int32))


@pytest.mark.parametrize("chosen", [0, 6])
def test_all_to_one(chosen):
    logits = torch.full((700, 7), -5.0)
    logits[:, chosen] = 5.0
    routing = rom.ops.route(logits, 1)
    assert routing.counts[chosen] == 700 and routing.counts.sum() == 700
    assert torch.equal(routing.perm, torch.arange(700, dtype=torch.int32))


def test_normalize_and_scale():
    routing = rom.ops.route(torch.randn(50, 6, dtype=torch.float64), 3, normalize=True, routed_scale=2.0)
    assert_close("sum", routing.weights.sum(-1), torch.full((50,), 2.0))


def test_masked_and_huge_logits():
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 1.0, -inf], [1e30, -1e30, 0.0, 1e30], [-inf, -inf, -inf, 3.0]])
    routing = rom.ops.route(logits, 2)
    assert torch.equal(routing.indices, reference.route(logits, 2)[0])
    assert_close("probs", routing.probs, logits.double().softmax(-1))
    assert (routing.probs[0, [0, 3]] == 0).all()


@pytest.mark.parametrize("experts", [3, 8, 40])
def test_nan_is_seen_in_the_weights_and_never_in_the_integers(experts):
    logits = torch.randn(70, experts)
    logits[torch.rand(70, experts) < 0.2] = float("nan")
    logits[0], logits[1] = float("nan"), float("inf")
    for top_k in (1, 3):
        routing = rom.ops.route(logits, top_k)
        check_invariants(routing, 70, experts, top_k)
        assert torch.equal(routing.indices, reference.route(logits, top_k)[0])
        bad = logits.isnan().any(-1) | logits.isinf().any(-1)
        assert torch.equal(routing.weights.isnan().all(-1), bad) and torch.equal(routing.probs.isnan().all(-1), bad)


def test_gradcheck_runs_the_native_kernel():
    logits = torch.randn(6, 5, dtype=torch.float64).mul_(3).requires_grad_()
    for normalize in (False, True):

        def function(x, normalize=normalize):
            routing = rom.ops.route(x, 2, normalize, 1.5)
            return routing.weights, routing.probs

        with rom.backend("cpu"):
            assert torch.autograd.gradcheck(function, logits, nondet_tol=0.0)


def test_non_contiguous_logits_and_gradients():
    wide = torch.randn(20, 16, requires_grad=True)
    logits = wide.t()[::2, :9].t()
    assert not logits.is_contiguous()
    routing, packed = rom.ops.route(logits, 2), rom.ops.route(logits.contiguous(), 2)
    assert all(torch.equal(a, b) for a, b in zip(routing, packed))
    (routing.weights.t().contiguous() * torch.arange(9.0)).sum().backward()  # a transposed gradient comes back
    assert torch.isfinite(wide.grad).all()


def test_deterministic_whatever_the_thread_count():
    logits = torch.randn(5000, 8, requires_grad=True)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        routing = rom.ops.route(logits, 2)
        (grad,) = torch.autograd.grad(routing.weights.square().sum() + routing.probs.cos().sum(), logits)
        runs.append([*routing, grad])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    logits = torch.randn(9, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.rom.route.default, (logits, 2, False, 1.0, backend))


def test_compile_and_export():
    def loss(logits):
        routing = rom.ops.route(logits, 2, routed_scale=routing_scale)
        return (routing.weights * routing.num_tokens).square().sum() + routing.probs.cos().sum(), routing

    routing_scale = 1.5
    logits = torch.randn(12, 6, requires_grad=True)
    expected, plain = loss(logits)
    got, compiled = torch.compile(loss, fullgraph=True)(logits)
    assert isinstance(compiled, rom.Routing) and torch.equal(compiled.perm, plain.perm)
    assert_close("grad", torch.autograd.grad(got, logits)[0], torch.autograd.grad(expected, logits)[0])

    class Module(torch.nn.Module):
        def forward(self, logits):
            return rom.ops.route(logits, 2).weights

    tokens = torch.export.Dim("tokens")
    program = torch.export.export(Module(), (logits.detach(),), dynamic_shapes=({0: tokens},))
    assert "rom.route" in str(program.graph)
    other = torch.randn(31, 6)
    assert torch.equal(program.module()(other), rom.ops.route(other, 2).weights)


@pytest.mark.parametrize(
    "logits, top_k, error, message",
    [
        (torch.ones(4, 8), 0, ValueError, r"expected top_k in 1 … 8 \(the number of experts\), got 0"),
        (torch.ones(4, 8), 9, ValueError, r"top_k in 1 … 8 \(the number of experts\), got 9"),
        (torch.ones(4, 8), 1.0, TypeError, "expected top_k to be an int, got float"),
        (torch.ones(4, 8), True, TypeError, "expected top_k to be an int, got bool"),
        (torch.ones(8), 1, ValueError, r"logits of shape \(tokens, experts\) with at least one expert, got \(8,\)"),
        (torch.ones(4, 0), 1, ValueError, r"at least one expert, got \(4, 0\)"),
        (torch.ones(4, 8, dtype=torch.int64), 1, TypeError, "expected logits of dtype float32"),
        ([[1.0]], 1, TypeError, "expected logits to be a tensor, got list"),
    ],
)
def test_errors(logits, top_k, error, message):
    with pytest.raises(error, match=message):
        rom.ops.route(logits, top_k)


def test_too_many_slots_for_int32():
    with pytest.raises(ValueError, match="tokens × top_k below 2147483648"):
        rom.ops.route(torch.empty(2**30, 2, device="meta"), 2)


def test_docstring_example(run_doctests):
    run_doctests(module)
