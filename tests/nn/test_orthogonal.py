import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rom

MAPS = ["cayley", "householder", "matrix_exp", "qr"]
# (out, in): square, tall, wide
SIZES = [(16, 16), (40, 20), (20, 40)]
BOUND = 1e-5  # of max |QᵀQ − I| in float32 at these sizes; matrix_exp is the worst, at 3e-6


def linear(out, inp, orthogonal_map=None, **options):
    return rom.nn.orthogonal(nn.Linear(inp, out, **options), orthogonal_map=orthogonal_map)


def error(weight):
    return rom.ops.orthogonality_error(weight.detach()).max().item()


def train(layer, steps, optimizer=torch.optim.AdamW, **options):
    """Towards a fixed random matrix."""
    target = torch.randn_like(layer.weight)
    steps_of = optimizer(layer.parameters(), **options)
    losses = []
    for _ in range(steps):
        loss = (layer.weight - target).square().mean()
        steps_of.zero_grad()
        loss.backward()
        steps_of.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------ what torch's loses
def test_one_default_adamw_step_collapses_the_weight_of_torch_but_not_ours():
    """torch keeps the ±1 of its default map in the trained tensor; weight decay makes them 0.99999, `.int()` makes
    those 0, and the weight is zero from then on. Ours has its signs in a buffer."""
    theirs, ours = parametrizations.orthogonal(nn.Linear(64, 128)), rom.nn.orthogonal(nn.Linear(64, 128))
    assert abs(theirs.weight.norm() - 8) < 1e-3 and abs(ours.weight.norm() - 8) < 1e-3
    train(theirs, 1)
    train(ours, 1)
    assert theirs.weight.norm() == 0  # if this fails, torch has been repaired
    assert abs(ours.weight.norm() - 8) < 1e-3 and error(ours.weight) < BOUND


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_training_with_weight_decay(name, size):
    layer = linear(*size, name)
    losses = train(layer, 30, lr=1e-2, weight_decay=0.1)
    assert losses[-1] < losses[0] and error(layer.weight) < BOUND
    train(layer, 3, torch.optim.SGD, lr=0.1, weight_decay=5e-4)
    assert error(layer.weight) < BOUND


@pytest.mark.parametrize("name", ["cayley", "householder"])
def test_federated_averages_of_the_parameters_stay_orthogonal(name):
    """Weights n_k / N that do not add up to exactly 1 in float32 truncate torch's signs to zero in 19 % of averages."""
    layers = [linear(12, 8, name) for _ in range(4)]
    averaged = linear(12, 8, name)
    for same in (True, False):
        for _ in range(40):
            counts = torch.randint(1, 1000, (4,)).float()
            shares = counts / counts.sum()
            states = [(layers[0] if same else layer).state_dict() for layer in layers]
            averaged.load_state_dict({k: sum(w * s[k] for w, s in zip(shares, states)) for k in states[0]})
            assert error(averaged.weight) < BOUND
            if same:
                assert torch.allclose(averaged.weight, layers[0].weight, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_half_precision(name, dtype):
    layer = linear(24, 16, name)
    before, halved = layer.weight.detach(), layer.to(dtype)
    assert halved.weight.dtype == dtype and error(halved.weight) < 4 * torch.finfo(dtype).eps
    assert torch.allclose(halved.weight.float(), before, atol=8 * torch.finfo(dtype).eps)
    made = linear(24, 16, name, dtype=dtype)
    assert error(made.weight) < 4 * torch.finfo(dtype).eps
    made(torch.randn(2, 16, dtype=dtype)).sum().backward()


# ------------------------------------------------------------------------------------------------ a drop-in
@pytest.mark.parametrize("size", [*SIZES, (3, 9, 5)], ids=str)
@pytest.mark.parametrize("name", [None, *MAPS])
def test_starts_where_the_weight_was_and_can_be_assigned(name, size):
    layer = nn.Module()
    q = nn.init.orthogonal_(torch.empty(size)) if len(size) == 2 else torch.linalg.qr(torch.randn(size))[0]
    layer.weight = nn.Parameter(q.clone())
    rom.nn.orthogonal(layer, orthogonal_map=name)
    assert (layer.weight - q).abs().max() < 1e-5
    other = torch.linalg.qr(torch.randn(*size[:-2], max(size[-2:]), min(size[-2:])))[0]
    other = other if size[-2] >= size[-1] else other.mT
    for target in (-q, q, other):  # both determinants, if square
        layer.weight = target
        assert (layer.weight - target).abs().max() < 1e-5
    layer.weight = torch.randn(size)
    assert error(layer.weight) < BOUND
    with pytest.raises(ValueError, match="expected a weight of shape"):
        layer.weight = torch.randn(7, 7)


def test_starts_as_torch_does_elsewhere():
    weight = torch.randn(9, 6)
    ours, theirs = nn.Linear(6, 9), nn.Linear(6, 9)
    for layer in (ours, theirs):
        layer.weight.data = weight.clone()
    rom.nn.orthogonal(ours), parametrizations.orthogonal(theirs)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_state_dict_deepcopy_and_removal(name):
    layer = linear(12, 8, name)
    layer.weight = -layer.weight.detach()
    train(layer, 3)
    weight = layer.weight.detach().clone()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = linear(12, 8, name)
    loaded.load_state_dict(torch.load(file))
    copied = copy.deepcopy(layer)
    assert torch.equal(loaded.weight, weight) and torch.equal(copied.weight, weight)
    train(copied, 1)
    assert torch.equal(layer.weight, weight) and not torch.equal(copied.weight, weight)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight) and isinstance(layer.weight, nn.Parameter)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_cached_computes_the_weight_once():
    layer = linear(12, 8)
    with parametrize.cached():
        assert layer.weight is layer.weight


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (3, 5)], ids=str)
def test_gradcheck_and_gradgradcheck(size, name):
    layer = linear(*size, name, dtype=torch.float64)
    x = layer.parametrizations.weight.original.detach().clone() + 0.3 * torch.randn(size, dtype=torch.float64)
    function = layer.parametrizations.weight[0]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("name", ["cayley", "householder"])
def test_compiles_into_one_graph(name):
    layer, x = linear(12, 8, name), torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).square().sum() + layer(x).sum(), list(layer.parameters()))
    y = compiled(x)
    got = torch.autograd.grad(y.square().sum() + y.sum(), list(layer.parameters()))
    assert torch.allclose(y, layer(x)) and all(torch.allclose(g, e, atol=1e-5) for g, e in zip(got, expected))


def test_kernels_of_a_convolution_are_a_batch():
    layer = rom.nn.orthogonal(nn.Conv2d(4, 6, 3))
    assert rom.ops.orthogonality_error(layer.weight).shape == (6, 4) and error(layer.weight) < BOUND


def test_matrix_exp_without_trivialization_maps_the_weight_and_refuses_assignment():
    weight = torch.randn(6, 6)
    layer = nn.Linear(6, 6)
    layer.weight.data = weight.clone()
    rom.nn.orthogonal(layer, orthogonal_map="matrix_exp", use_trivialization=False)
    assert torch.allclose(layer.weight, torch.matrix_exp(weight.tril() - weight.tril().mT), atol=1e-5)
    with pytest.raises(NotImplementedError, match="cannot be assigned"):
        layer.weight = torch.eye(6)


def test_rebase_keeps_the_weight_and_shrinks_the_parameter():
    layer = linear(16, 16, "cayley", dtype=torch.float64)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(300).add_(30)
    weight, far = layer.weight.detach().clone(), layer.parametrizations.weight.original.norm().item()
    rom.nn.rebase(layer)
    assert torch.allclose(layer.weight, weight, atol=1e-9)
    assert layer.parametrizations.weight.original.norm() < far / 3


# ------------------------------------------------------------------------------------------------ OrthogonalLinear
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(size):
    out, inp = size
    layer, x = rom.nn.OrthogonalLinear(inp, out), torch.randn(3, inp)
    assert not layer.bias.any() and error(layer.weight) < BOUND
    assert torch.allclose(layer(x), x @ layer.weight.mT, atol=1e-5)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert error(layer.weight) < BOUND and not torch.equal(layer.weight, before)
    assert isinstance(copy.deepcopy(layer), rom.nn.OrthogonalLinear)
    half = rom.nn.OrthogonalLinear(inp, out, bias=False, orthogonal_map="cayley", dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: rom.nn.orthogonal(nn.Linear(3, 3), "kernel"), ValueError, "named 'kernel'"),
        (lambda: rom.nn.orthogonal(nn.Linear(3, 3), "bias"), ValueError, r"got shape \(3,\)"),
        (lambda: linear(3, 3, "polar"), ValueError, "expected orthogonal_map one of"),
        (lambda: linear(3, 3, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_docstring_examples(run_doctests):
    run_doctests(sys.modules["rom.nn.orthogonal"])  # the attribute rom.nn.orthogonal is the function
