import numpy as np
import pytest
import torch

import rom
from rom import faults
from rom.faults import Target
from rom.nn import faulty_linear

SIGN = faults.flip(1 << 31)


def make(**options):
    linear = torch.nn.Linear(40, 7)
    layer = rom.nn.FaultyLinear.from_linear(linear, **options)
    layer.arm(
        np.concatenate([faults.sites(Target.OUTPUT, SIGN, 1, col=2), faults.sites(Target.B, SIGN, 2, k=3, col=1)])
    )
    return linear, layer, torch.randn(4, 40)


def test_shares_parameters_and_state_dict():
    linear, layer, x = make()
    y = layer(x)
    assert (y != linear(x)).nonzero().tolist() == [[1, 2], [2, 1]]
    assert layer.log["status"].tolist() == [1, 1]
    assert layer.weight is linear.weight and list(layer.state_dict()) == list(linear.state_dict())
    y.sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad[2] == 2  # 4 samples, one of them negated
    layer.arm(np.zeros(0, faults.SITE))
    assert torch.equal(layer(x), linear(x)) and len(layer.log) == 0


def test_one_sample_without_a_batch():
    linear, layer, x = make()
    layer.arm(faults.sites(Target.OUTPUT, SIGN, 0, col=2))
    assert (layer(x[0]) != linear(x[0])).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"bounds": (-0.1, 0.1)}, {"grad": "ste"}])
def test_options(options):
    _, layer, x = make(**options)
    assert layer(x).abs().max() <= 0.1 or "bounds" not in options


def test_compiled():
    _, layer, x = make()
    expected = layer(x)
    layer.written.zero_()
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert layer.log["status"].tolist() == [1, 1]


def test_example(run_doctests):
    run_doctests(faulty_linear)
