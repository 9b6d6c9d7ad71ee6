"""Which parameters decay, and the shape of the schedule."""

import pytest
import torch
from torch import nn

from rom.training.optimizer import adamw, decay_groups, warmup_cosine


def test_decay_groups():
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "embedding": nn.Embedding(5, 3)})
    model.A_log = nn.Parameter(torch.zeros(4, 2))
    model.A_log._no_weight_decay = True
    model.experts = nn.ParameterDict({"weight": torch.zeros(2, 4, 3), "bias": torch.zeros(2, 4)})
    model.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.tied = model["embedding"].weight
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", names[id(model.tied)], "experts.weight"}
    assert {names[id(p)] for p in free["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "A_log",
        "experts.bias",
    }


def test_adamw_settings():
    optimizer = adamw(nn.Linear(2, 2), 1e-3, 0.1)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2


def test_schedule():
    assert warmup_cosine(0.0, 0.1, 0.1) == 0
    assert warmup_cosine(0.05, 0.1, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1, 0.1) == pytest.approx(1)
    assert warmup_cosine(0.55, 0.1, 0.1) == pytest.approx(0.55)
    assert warmup_cosine(1.0, 0.1, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(1.5, 0.1, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(1.0, 1.0, 0.1) == pytest.approx(0.1)
    values = [warmup_cosine(i / 100, 0.03, 0.1) for i in range(101)]
    assert values[3:] == sorted(values[3:], reverse=True)
