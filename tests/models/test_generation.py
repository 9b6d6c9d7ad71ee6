import pytest
import torch

from rom.models import RoutingMambaConfig, RoutingMambaLM
from rom.models.generation import Sampling

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def make():
    model = RoutingMambaLM(RoutingMambaConfig(vocab_size=40, d_model=32, n_layer=2, num_experts=4))
    with torch.no_grad():  # confident enough that no two tokens tie
        model.backbone.embedding.weight.mul_(20)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def uncached(model, ids, new):
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_equals_the_uncached_model():
    model, ids = make(), torch.randint(40, (3, 6))
    assert torch.equal(model.generate(ids, 16), uncached(model, ids, 16))
    assert torch.equal(model.generate(ids, 0), ids)


def test_sampling_follows_the_seed_and_the_distribution():
    model, ids = make(), torch.randint(40, (1, 4))
    runs = [model.generate(ids, 12, do_sample=True, temperature=50.0, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(model.generate(ids, 12, do_sample=True, top_k=1), model.generate(ids, 12))
    draws = Sampling(do_sample=True)(LOGITS.expand(20000, -1), None, seeded(0))
    assert torch.allclose(draws.bincount(minlength=5) / 20000, LOGITS[0].exp(), atol=0.015)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 1]),
    ],
)
def test_filters(options, kept):
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    filtered = Sampling(do_sample=True, **options).filter(LOGITS[:, shuffled])
    assert sorted(shuffled[torch.isfinite(filtered[0])].tolist()) == kept


def test_temperature_and_repetition_penalty():
    seen = torch.tensor([[True, False, False, False, False]])
    assert Sampling(repetition_penalty=3.0)(LOGITS, seen, None).item() == 1  # log 0.5 · 3 < log 0.25
    assert Sampling(repetition_penalty=3.0)(LOGITS + 5, seen, None).item() == 1  # positive logits are divided
    cold = Sampling(do_sample=True, temperature=1e-3)(LOGITS.expand(100, -1), None, None)
    assert not cold.any()
    model, ids = make(), torch.tensor([[1, 2, 3]])
    text = model.generate(ids, 30, repetition_penalty=1e6)[0].tolist()
    assert len(set(text)) == 33  # nothing comes twice while something else is left


def test_stop_and_streamer():
    model, ids = make(), torch.randint(40, (2, 5))
    free = model.generate(ids, 12)
    stop = free[0, 7].item()

    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, tokens):
            self.parts.append(tokens)

        def end(self):
            self.ended = True

    streamer = Streamer()
    got = model.generate(ids, 12, stop=[stop], streamer=streamer)
    first = (free[0, 5:] == stop).nonzero()[0].item() + 5
    assert torch.equal(got[0, : first + 1], free[0, : first + 1]) and (got[0, first:] == stop).all()
    streamed = torch.cat([streamer.parts[0], torch.stack(streamer.parts[1:], 1)], 1)
    assert torch.equal(streamed, got) and streamer.ended
    alone = model.generate(ids[:1], 12, stop=stop)
    assert alone.shape == (1, first + 1) and alone[0, -1] == stop


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.long), 3), "length >= 1, got \\(1, 0\\)"),
        (lambda m: m.generate(torch.tensor([1]), 3), "input_ids of shape"),
        (lambda m: m.generate(torch.tensor([[1]]), -1), "max_new_tokens >= 0, got -1"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, temperature=0.0), "temperature > 0 .*greedy.*, got 0.0"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, top_p=0.0), "0 < top_p <= 1, got 0.0"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, top_k=-1), "top_k >= 0, got -1"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, min_p=2), "0 <= min_p <= 1, got 2"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, repetition_penalty=0), "repetition_penalty > 0, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
