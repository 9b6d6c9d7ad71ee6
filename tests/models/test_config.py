import dataclasses

import pytest

from rom.models import RoutingMambaConfig, RoutingMambaLM, config

# design counts at vocabulary 32 000, tied embeddings: dense M, active M, total billions
COUNTS = {
    "115m": (115.1, 115.2, 0.71),
    "353m": (352.8, 353.2, 2.47),
    "765m": (765.1, 765.7, 5.52),
    "1.3b": (1334.7, 1335.5, 9.79),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper(name):
    model = RoutingMambaLM(RoutingMambaConfig.preset(name), device="meta")
    dense = RoutingMambaLM(RoutingMambaConfig.preset(name, num_experts=1), device="meta")
    assert dense.num_parameters() == dense.num_parameters(active=True)
    counts = dense.num_parameters() / 1e6, model.num_parameters(active=True) / 1e6, model.num_parameters() / 1e9
    assert (round(counts[0], 1), round(counts[1], 1), round(counts[2], 2)) == COUNTS[name]


def test_tiny_is_a_laptop_model():
    model = RoutingMambaLM(RoutingMambaConfig.preset("tiny", vocab_size=256), device="meta")
    config = model.config
    assert (config.d_model, config.n_layer, config.num_experts, config.top_k) == (160, 4, 4, 1)
    assert model.num_parameters() < 3e6


def test_round_trips():
    changed = RoutingMambaConfig.preset("tiny", vocab_size=99, experts_on=("out",), expand=1.5, dt_rank=7)
    assert RoutingMambaConfig.from_dict(changed.to_dict()) == changed
    assert RoutingMambaConfig.from_json(changed.to_json()) == changed
    assert dataclasses.replace(changed, vocab_size=100).padded_vocab_size == 100
    assert dataclasses.replace(changed, pad_vocab_size_multiple=8).padded_vocab_size == 104


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RoutingMambaConfig(0), "vocab_size to be a positive integer, got 0"),
        (lambda: RoutingMambaConfig(10, n_layer=1.5), "n_layer to be a positive integer, got 1.5"),
        (lambda: RoutingMambaConfig(10, norm_epsilon=-1), "norm_epsilon >= 0, got -1"),
        (lambda: RoutingMambaConfig(10, z_loss_coefficient=float("nan")), "z_loss_coefficient >= 0, got nan"),
        (lambda: RoutingMambaConfig.preset("7b"), "expected one of tiny, 115m, .*, got '7b'"),
        (lambda: RoutingMambaConfig.from_dict({"vocab_size": 9, "width": 3}), "unknown fields width"),
        (lambda: RoutingMambaConfig.from_dict({"d_model": 9}), "the field vocab_size"),
        (lambda: RoutingMambaConfig.from_json('{"vocab_size": 9'), "expected JSON, got text that is not"),
        (lambda: RoutingMambaConfig.from_json("[1]"), "expected a JSON object, got list"),
        (lambda: RoutingMambaLM(RoutingMambaConfig(10, num_experts=2, top_k=3)), "1 <= top_k <= num_experts"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples(run_doctests):
    run_doctests(config)
