import importlib

import pytest
import torch
from tolerance import assert_close

import rom
from rom.nn import RoutedLinear, load_balance_loss, router_z_loss, routing_statistics


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("experts", [1, 4])
def test_forward_is_the_operator_on_the_parameters(experts, bias):
    layer = RoutedLinear(6, 10, experts, bias=bias)
    routing = rom.ops.route(torch.randn(9, experts), 1)
    x = torch.randn(9, 6)
    weight, offset = layer.weight.view(experts, 10, 6), layer.bias.view(experts, 10) if bias else None
    for options in ({}, {"weighted": True}, {"rows_in": "expert", "rows_out": "expert"}):
        assert torch.equal(layer(x, routing, **options), rom.ops.routed_linear(x, weight, routing, offset, **options))


def test_one_expert_has_the_parameters_of_a_linear():
    layer, plain = RoutedLinear(6, 10, 1, bias=True), torch.nn.Linear(6, 10)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(layer(x, rom.ops.route(torch.randn(5, 1), 1)), plain(x))


def test_shapes_device_dtype_and_repr():
    layer = RoutedLinear(6, 10, 4, bias=True, device="meta", dtype=torch.bfloat16)
    assert layer.weight.shape == (4, 10, 6) and layer.bias.shape == (4, 10)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    assert repr(layer) == "RoutedLinear(in_features=6, out_features=10, num_experts=4, bias=True)"


def test_experts_start_like_a_linear():
    layer = RoutedLinear(100, 300, 3, bias=True)
    for expert in layer.weight:
        assert expert.abs().max() <= 0.1 and abs(expert.std() - 0.1 / 3**0.5) < 1e-3
    assert not torch.equal(layer.weight[0], layer.weight[1]) and layer.bias.abs().max() <= 0.1


@pytest.mark.parametrize("name", ["in_features", "out_features", "num_experts"])
def test_sizes_below_one(name):
    sizes = {"in_features": 2, "out_features": 2, "num_experts": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, got 0"):
        RoutedLinear(**sizes)


def test_a_router_learns_through_the_weights():
    torch.set_num_threads(1)  # the work is tiny
    router, layer = torch.nn.Linear(4, 2, bias=False), RoutedLinear(4, 4, 2)
    x = torch.randn(64, 4)
    target = torch.where(x[:, :1] > 0, x, -x)
    optimizer = torch.optim.Adam([*router.parameters(), *layer.parameters()], lr=0.1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x, rom.ops.route(router(x), 1), weighted=True) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert router.weight.grad.abs().max() > 0 and losses[-1] < 0.2 * losses[0]


def test_load_balance_loss():
    even, collapsed = torch.eye(4).repeat(5, 1) * 50, torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(20, 1)
    assert_close("even", load_balance_loss(rom.ops.route(even, 1)), torch.tensor(1.0))
    assert_close("collapsed", load_balance_loss(rom.ops.route(collapsed, 1)), torch.tensor(4.0))
    logits = torch.randn(7, 3, dtype=torch.float64).mul_(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(rom.ops.route(x, 2)), logits)


def test_router_z_loss():
    logits = torch.randn(11, 5).bfloat16()
    assert_close("z", router_z_loss(logits), logits.double().exp().sum(-1).log().square().mean())


def test_statistics():
    logits = torch.randn(50, 4, requires_grad=True)
    routing = rom.ops.route(logits, 2)
    statistics = routing_statistics(routing)
    assert_close("fraction", statistics.fraction, torch.bincount(routing.indices.flatten(), minlength=4) / 100)
    assert_close("probability", statistics.probability, logits.double().softmax(-1).mean(0))
    assert_close(
        "entropy", statistics.entropy, torch.distributions.Categorical(logits=logits.double()).entropy().mean()
    )
    assert statistics.dropped == 0 and not statistics.probability.requires_grad and not statistics.entropy.requires_grad


def test_an_empty_batch_has_no_nan():
    logits = torch.zeros(0, 4)
    routing = rom.ops.route(logits, 2)
    assert load_balance_loss(routing) == 0 and router_z_loss(logits) == 0
    assert not any(torch.as_tensor(value).any() for value in routing_statistics(routing))


@pytest.mark.parametrize("module", ["rom.nn.routed_linear", "rom.nn.routing_losses"])
def test_docstring_examples(module, run_doctests):
    run_doctests(importlib.import_module(module))
