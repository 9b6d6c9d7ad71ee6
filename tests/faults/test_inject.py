"""Faults in whole models: what PyTorchFI breaks on (listed in the docs) passes here, in every way of running torch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rom
from rom import faults
from rom.faults import FaultPlan, Stratum, Target, inject, layers

SIGN = faults.flip(1 << 31)


class Net(nn.Module):
    """Convolution, batch norm, a skip connection, a shared layer, functional products, a sigmoid at the end."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.shared = nn.Linear(6, 6)
        self.weight = nn.Parameter(0.4 * torch.randn(6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = x.flatten(2).mT
        x = x + self.shared(self.shared(x))
        x = nn.functional.linear(x, self.weight) @ self.weight
        x = torch.einsum("bld,bmd->blm", x, x).softmax(-1) @ x  # or the sigmoid has nothing to tell
        return torch.sigmoid(self.head(x.mean(1)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def found(net):
    return faults.survey(net, torch.randn(2, 3, 4, 4))


def one(layer, target=Target.OUTPUT, samples=8, found=None, masks=SIGN, **where):
    """A plan of one fault."""
    extent = found.layer(layer).extents[target]
    sizes = extent.rows, extent.cols, extent.k
    whole = None if where.get("sample", faults.ALL) == faults.ALL else samples
    return FaultPlan.from_sites(
        [Stratum(layer, target, extent.dtype, whole, *sizes)], 0, faults.sites(target, masks, **where)
    )


# ------------------------------------------------------------------------------------------------ layers
def test_finds_every_layer(found):
    names = {layer.name: layer.kind for layer in found}
    expected = {"conv": "conv2d", "norm": "batch_norm", "relu": "relu", "shared": "linear", "shared#2": "linear"}
    expected |= {"matmul": "matmul", "matmul#2": "matmul", "einsum": "einsum", "head": "linear", "sigmoid": "sigmoid"}
    assert expected.items() <= names.items()
    assert names.get("linear", names.get("weight")) == "linear"
    assert found.layer("matmul#2").extents[Target.B].shared is False  # of two activations
    conv = found.layer("conv").extents
    assert (
        conv[Target.A][1:4] == (16, 1, 3) and conv[Target.B][1:4] == (1, 6, 27) and conv[Target.OUTPUT][1:3] == (16, 6)
    )


def test_a_bare_linear_layer_and_one_sample():
    linear = nn.Linear(4, 3)
    found = faults.survey(linear, torch.randn(1, 4))
    assert [layer.name for layer in found] == ["linear"]
    faulty = rom.inject(found, one("linear", found=found, sample=0, col=1))
    x = torch.randn(1, 4)
    assert faulty(x)[0, 1] == -linear(x)[0, 1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("frozen", [True, False])  # frozen parameters take the fused path in torch
def test_transformer_encoder_layer(batch_first, frozen):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for parameter in layer.parameters():
        parameter.requires_grad_(not frozen)
    x = torch.randn(3, 5, 8)
    if not batch_first:  # the sample is the second dimension on the way, as in the attention itself
        layer = nn.Sequential(layer, nn.Linear(8, 2))
    found = faults.survey(layer, x)
    names = [entry.name for entry in found]
    prefix = "" if batch_first else "0."
    expected = ("self_attn.in_proj", "self_attn.attention.scores", "self_attn.attention.values", "self_attn.out_proj")
    for name in (*expected, "linear1", "linear2"):
        assert prefix + name in names, names
        for target in found.layer(prefix + name).extents:
            where = {} if target == Target.BIAS else {"sample": 1}
            k = {"k": found.layer(prefix + name).extents[target].k} if target == Target.ACCUMULATOR else {}
            plan = one(prefix + name, target, found=found, masks=faults.flip(1 << 30), **where, **k)
            faulty = rom.inject(found, plan)
            y = faulty(x)
            entry = faulty.log()[0]
            assert entry["status"] == 1 and entry["old"] ^ entry["new"] == 1 << 30
            different = (abs(y - layer(x)) > 1e-5).flatten(1).any(1) if target != Target.BIAS else None
            assert different is None or (different.tolist()[0], different.tolist()[2]) == (False, False), name


# ------------------------------------------------------------------------------------------------ every target
def test_every_layer_and_target_leaves_a_log(net, found):
    x = torch.randn(4, 3, 4, 4)
    clean = net(x)
    strata = found.strata(4, tuple(Target), layers=lambda layer: True)
    assert len({stratum.layer for stratum in strata}) == len(found.layers)
    plan = FaultPlan.stratified(strata, [2] * len(strata), seed=3)
    faulty = rom.inject(found, plan)
    faulty(x)
    log = faulty.log()
    assert (log["status"] == 1).all() and (log["old"] != log["new"]).all()
    assert (log["old"] ^ log["new"] == log["xor_mask"]).all()
    assert torch.equal(net(x), clean)


@pytest.mark.parametrize("layer, target", [("conv", Target.A), ("conv", Target.B), ("conv", Target.BIAS)])
def test_memory_of_a_convolution(net, found, layer, target):
    x = torch.randn(2, 3, 4, 4)
    where = {Target.A: {"sample": 1, "row": 6, "k": 2}, Target.B: {"k": 14, "col": 3}, Target.BIAS: {"col": 3}}[target]
    faulty = rom.inject(found, one(layer, target, found=found, **where))
    other, changed = copy.deepcopy(net), x.clone()
    with torch.no_grad():
        if target == Target.A:
            changed[1, 2].view(-1)[6] *= -1
        elif target == Target.B:
            other.conv.weight.view(6, 27)[3, 14] *= -1
        else:
            other.conv.bias[3] *= -1
        assert torch.allclose(faulty(x), other(changed), atol=1e-6)
        assert not torch.allclose(faulty(x), net(x), atol=1e-6)


def test_a_convolutions_result(net, found):
    x = torch.randn(2, 3, 4, 4)
    seen = []
    faulty = rom.inject(found, one("conv", found=found, sample=1, row=7, col=4))
    name = next(name for name, _ in faulty.graph.named_children() if name.startswith("faults"))
    faulty.graph.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[-1]))
    faulty(x)
    expected = net.conv(x)
    expected[1, 4, 1, 3] *= -1
    assert torch.equal(seen[0], expected)


# ------------------------------------------------------------------------------------------------ a peer's breakages
def test_a_second_call(found):
    faulty = rom.inject(found, one("head", found=found, sample=0, col=1))
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(faulty(x), faulty(x)) and faulty.log()["status"].tolist() == [1]


def test_values_of_any_size():
    linear = nn.Linear(2, 2, bias=False)
    nn.init.constant_(linear.weight, 3e38)
    found = faults.survey(linear, torch.randn(2, 2))
    faulty = rom.inject(found, one("linear", found=found, sample=0, masks=faults.flip(1 << 22)))
    assert faulty(torch.ones(2, 2))[0, 0].isnan() and faulty(torch.ones(2, 2))[0, 1].isinf()


def test_a_value_at_the_maximum_of_its_range(net, found):
    x = torch.randn(3, 3, 4, 4)
    bounds = found.profile([x])
    with torch.no_grad():
        sums = net(x).logit()  # the head's results, before the sigmoid
        sample, col = divmod(int(sums.argmax()), 5)
        plan = one("head", found=found, sample=sample, col=col, masks=faults.flip(1 << 22))
        for restricted in ({}, {"head": bounds["head"]}, {"head": (-1e-3, 1e-3)}):
            faulty = rom.inject(found, plan, bounds=restricted)
            y = faulty(x)
            assert y.isfinite().all() and faulty.log()["old"] ^ faulty.log()["new"] == 1 << 22
            assert not restricted or (y.logit().abs() <= max(map(abs, restricted["head"])) + 1e-4).all()


def test_a_bad_index_is_refused_with_its_name(found):
    for where, message in [({"col": 5}, "col below 5 in layer 'head'"), ({"sample": 8}, "sample below 8")]:
        with pytest.raises(ValueError, match=message):
            one("head", found=found, **{"sample": 0, **where})


def test_a_shared_layer_is_hit_in_one_of_its_calls():
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    found, x = faults.survey(model, torch.randn(2, 4)), torch.randn(3, 4)
    names = [layer.name for layer in found if layer.kind == "linear"]
    assert len(names) == 2
    with torch.no_grad():
        first, second = (rom.inject(found, one(name, found=found, sample=1, col=2))(x) for name in names)
        hidden = linear(x)
        hidden[1, 2] *= -1
        assert torch.allclose(first, linear(hidden.relu()), atol=1e-6)
        assert (second != model(x)).nonzero().tolist() == [[1, 2]]


def test_a_second_plan_on_the_same_model(net, found):
    x = torch.randn(3, 3, 4, 4)
    first = rom.inject(found, one("head", found=found, sample=0, col=1))
    before = first(x)
    second = rom.inject(net, one("relu", found=found, sample=1, row=2, col=3, masks=faults.flip(1 << 30)), x)
    assert torch.equal(first(x), before) and not torch.equal(second(x), net(x))


@pytest.mark.parametrize("layer", ["relu", "sigmoid", "norm", "einsum"])
def test_layers_without_weights(net, found, layer):
    faulty = rom.inject(found, one(layer, found=found, sample=1, masks=faults.flip(1 << 30)))
    x = torch.randn(3, 3, 4, 4)
    y = faulty(x)
    y.sum().backward()  # the result of a sigmoid is what its backward pass reads: never changed in place
    assert faulty.log()["status"] == 1 and faulty.log()["old"] != faulty.log()["new"]
    different = (y != net(x)).any(1)
    assert not different[0] and not different[2]
    net.zero_grad()


def test_partial_batches_and_batch_sizes(net, found):
    data = torch.randn(11, 3, 4, 4)
    plan = FaultPlan.simple(found.strata(11, (Target.OUTPUT, Target.ACCUMULATOR)), 40, seed=2)
    faulty = rom.inject(found, plan)
    whole, log = faulty(data), faulty.log()
    assert (log["status"] == 1).all()
    for size in (1, 3, 4, 8):
        statuses = np.zeros(40, int)
        for first in range(0, 11, size):
            faulty.arm(first_sample=first)
            batch = faulty(data[first : first + size])
            assert torch.allclose(batch, whole[first : first + size], atol=1e-5, equal_nan=True)
            entries = faulty.log()
            hit = entries["status"] == 1
            statuses += hit
            memory = hit & (entries["target"] == Target.OUTPUT)
            exact = entries["old"][memory].view(np.float32), log["old"][memory].view(np.float32)
            assert np.allclose(*exact, atol=1e-4, rtol=1e-2, equal_nan=True)
        assert (statuses == 1).all()


def test_gradients_reach_the_users_parameters(found, net):
    x = torch.randn(3, 3, 4, 4)
    net.zero_grad()
    net(x).sum().backward()
    clean = {name: p.grad.clone() for name, p in net.named_parameters()}
    for grad, same in (("clean", True), ("true", False)):
        net.zero_grad()
        plan = one("head", Target.A, found=found, sample=0, k=2)
        faulty = rom.inject(found, plan, grad=grad)
        assert {id(p) for p in faulty.parameters()} == {id(p) for p in net.parameters()}
        faulty(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert torch.equal(net.head.bias.grad, clean["head.bias"]) is False  # the sigmoid saw another value
        assert torch.allclose(net.head.weight.grad[0, 2], clean["head.weight"][0, 2], rtol=0.5) or not same
    net.zero_grad()


def test_the_model_is_untouched():
    torch.manual_seed(0)
    model = Net().train()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 4, 4)
    keys = set(vars(model))
    found = faults.survey(model, x)
    faulty = rom.inject(found, FaultPlan.simple(found.strata(4), 5, seed=0))
    faulty(x)
    faulty(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == keys and not model._forward_hooks and model.training


# ------------------------------------------------------------------------------------------------ ways of running torch
def run_eager(faulty, net, x):
    return faulty(x)


def run_inference(faulty, net, x):
    with torch.inference_mode():
        faulty.arm()
        return faulty(x)


def run_compiled(faulty, net, x):
    return torch.compile(faulty, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("run", [run_eager, run_inference, run_compiled])
def test_the_log_tells_the_same_however_it_runs(net, found, run):
    x = torch.randn(3, 3, 4, 4)
    plan = FaultPlan.simple(found.strata(3, (Target.A, Target.B, Target.OUTPUT)), 20, seed=4)
    faulty = rom.inject(found, plan)
    expected, log = faulty(x), faulty.log()
    faulty.arm()
    assert not faulty.log()["status"].any()
    y = run(faulty, net, x)
    assert torch.allclose(y, expected, atol=1e-5, equal_nan=True) and not torch.allclose(y, net(x), equal_nan=True)
    assert (faulty.log()["status"] == 1).all() and (faulty.log()["old"] ^ faulty.log()["new"] == log["xor_mask"]).all()
    assert torch.equal(faulty(x).isnan(), expected.isnan())  # and the normal mode still works after it


def test_compile_before_inject(net, found):
    x = torch.randn(3, 3, 4, 4)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x)
    plan = one("head", found=found, sample=0, col=1)
    faulty = rom.inject(compiled, plan, x)
    assert (faulty(x) != net(x)).nonzero().tolist() == [[0, 1]] and faulty.log()["status"] == 1


def test_autocast(net):
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = faults.survey(net, x)
        assert found.layer("head").extents[Target.OUTPUT].dtype == "bfloat16"
        assert found.layer("head").extents[Target.ACCUMULATOR].dtype == "float32"
        faulty = rom.inject(found, one("head", found=found, sample=0, col=1, masks=faults.flip(1 << 15)))
        y, clean = faulty(x), net(x)
        assert (y != clean).nonzero().tolist() == [[0, 1]]
        plain = faults.survey(net, x)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        other = faults.survey(net, x)
    faulty = rom.inject(other, one("head", found=other, sample=0, col=1))
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="under the autocast"),
    ):
        faulty(x)
    assert len(plain.layers) >= len(other.layers)


def test_rearming_a_compiled_model_does_not_compile_again(net, found):
    x = torch.randn(3, 3, 4, 4)
    plan = FaultPlan.simple(found.strata(3), 40, seed=4)
    faulty = rom.inject(found, plan)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(faulty, fullgraph=True, backend=counter)
    for i in range(0, 40, 4):
        faulty.arm(plan[i : i + 4])
        compiled(x)
        assert (faulty.log()["status"] == 1).all() and len(faulty.log()) == 4
    assert counter.frame_count <= 2


# ------------------------------------------------------------------------------------------------ arming
def test_a_fault_per_row(net, found):
    x = torch.randn(1, 3, 4, 4).expand(16, -1, -1, -1)
    plan = FaultPlan.simple(found.strata(1, (Target.B, Target.OUTPUT), ["head", "shared"]), 16, seed=1)
    faulty = rom.inject(found, plan)
    faulty.arm_rows(plan[:])
    together, log = faulty(x), faulty.log()
    assert (log["status"] == 1).all()
    for i in range(16):
        faulty.arm(plan[i])
        alone = faulty(x[:1])
        assert torch.allclose(together[i], alone[0], atol=1e-5, equal_nan=True)
        assert faulty.log()["old"][0] == log["old"][i] or plan[i].sites["target"][0] == Target.OUTPUT
    conv = FaultPlan.simple(found.strata(1, [Target.B], ["conv"]), 3, seed=1)
    with pytest.raises(ValueError, match="one memory for all rows"):
        rom.inject(found, conv).arm_rows(conv[:])


def test_bounds_are_those_of_the_profile(net, found):
    data = torch.randn(8, 3, 4, 4)
    bounds = found.profile(data.split(4))
    with torch.no_grad():
        faulty = rom.inject(found, one("head", found=found, sample=0, masks=faults.flip(1 << 30)), bounds=bounds)
        y = faulty(data)
        unbounded = rom.inject(found, one("head", found=found, sample=0, masks=faults.flip(1 << 30)))(data)
    assert torch.equal(y[1:], net(data)[1:])
    assert abs(y[0, 0] - net(data)[0, 0]) <= abs(unbounded[0, 0] - net(data)[0, 0])


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "stratum, message",
    [
        (Stratum("hed", Target.OUTPUT, "float32", 3, cols=5), "a layer of 'conv'.*got 'hed'"),
        (Stratum("relu", Target.B, "float32", None), "layer 'relu' has OUTPUT, got a stratum of B"),
        (Stratum("head", Target.OUTPUT, "float16", 3, cols=5), "has float32 there, got float16"),
        (Stratum("head", Target.OUTPUT, "float32", 3, cols=6), "has cols 5, got a stratum of 6"),
        (Stratum("conv", Target.B, "float32", 3, cols=6, k=27), "B of 'conv' is one memory"),
    ],
)
def test_plans_of_another_model_are_refused(found, stratum, message):
    with pytest.raises(ValueError, match=message):
        rom.inject(found, FaultPlan.simple([stratum], 1, seed=0))


def test_models_that_cannot_be_traced():
    class Data(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, 2) * 2

    with pytest.raises(ValueError, match=r"torch\.export cannot trace this Data"):
        faults.survey(Data(), torch.randn(2, 2))
    with pytest.raises(ValueError, match="of any size"):
        faults.survey(Fixed(), torch.randn(4, 2))
    with pytest.raises(ValueError, match="example inputs"):
        faults.survey(nn.Linear(2, 2))


def test_examples(run_doctests):
    run_doctests(inject)
    run_doctests(layers)
