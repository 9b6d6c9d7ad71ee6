import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

import rom
from rom.models import RoutingMambaConfig, RoutingMambaLM, language_model


def make(dtype=torch.float32, **changes):
    fields = {"vocab_size": 50, "d_model": 32, "n_layer": 3, "num_experts": 4, "top_k": 2, **changes}
    return RoutingMambaLM(RoutingMambaConfig(**fields), dtype=dtype)


def tokens(*shape):
    return torch.randint(50, shape)


def test_is_blocks_on_a_residual_stream():
    model, ids = make(), tokens(2, 9)
    hidden = model.backbone.embedding(ids)
    for layer in model.backbone.layers:
        hidden = hidden + layer.mixer(F.rms_norm(hidden, (32,), layer.norm.weight, 1e-5))
    normed = F.rms_norm(hidden, (32,), model.backbone.norm_f.weight, 1e-5)
    assert_close("logits", model(ids).logits, normed @ model.backbone.embedding.weight.T, scale=4)  # float32 both


def test_loss_shifts_the_labels():
    model, ids = make(), tokens(2, 9)
    labels = ids.clone()
    labels[0, 4:6] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close("loss", out.loss, expected)
    assert out.aux.keys() == {"cross_entropy"} and model(ids).loss is None
    out.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_packed_sequences_are_separate():
    model, ids = make(), tokens(1, 12)
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    out = model(ids, labels=ids, cu_seqlens=cu_seqlens)
    parts = [model(part, labels=part) for part in ids.split([5, 1, 6], dim=1)]
    assert_close("logits", out.logits, torch.cat([part.logits for part in parts], 1))
    assert_close("loss", out.loss, (4 * parts[0].loss + 5 * parts[2].loss) / 9)  # a pair across a boundary is none


def test_auxiliary_losses():
    model = make(load_balance_coefficient=0.01, z_loss_coefficient=0.001)
    plain = copy.deepcopy(model)
    plain.config = RoutingMambaConfig(
        **{**model.config.to_dict(), "load_balance_coefficient": 0, "z_loss_coefficient": 0}
    )
    ids = tokens(2, 20)
    out, expected = model(ids, labels=ids), plain(ids, labels=ids)
    assert torch.equal(out.logits, expected.logits)
    assert_close("cross-entropy", out.aux["cross_entropy"], expected.loss)
    assert 1 <= out.aux["load_balance"] < 4 and out.aux["z_loss"] > 0
    assert_close("loss", out.loss, expected.loss + 0.01 * out.aux["load_balance"] + 0.001 * out.aux["z_loss"])
    router = model.backbone.layers[0].mixer.router.weight
    assert torch.autograd.grad(out.aux["load_balance"], router, retain_graph=True)[0].any()
    assert torch.autograd.grad(out.aux["z_loss"], router)[0].any()


def test_load_statistics():
    model = make()
    assert model.load_statistics() is None and make(num_experts=1, top_k=1).load_statistics() is None
    model(tokens(2, 9))
    statistics = model.load_statistics()
    assert statistics.fraction.shape == statistics.probability.shape == (3, 4) and statistics.entropy.shape == (3,)
    assert_close("fractions", statistics.fraction.sum(-1), torch.ones(3))
    assert statistics.dropped == 0


def test_logits_to_keep_and_padded_vocabulary():
    model, ids = make(pad_vocab_size_multiple=16), tokens(2, 9)
    assert model.backbone.embedding.weight.shape == (64, 32)
    logits = model(ids).logits
    assert logits.shape == (2, 9, 50)
    assert_close("kept", model(ids, logits_to_keep=2).logits, logits[:, -2:])
    untied = make(tie_embeddings=False)
    assert untied.lm_head.weight.shape == (50, 32) and untied(ids).logits.shape == (2, 9, 50)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_low_precision(residual_in_fp32):
    model, ids = make(top_k=4, residual_in_fp32=residual_in_fp32), tokens(2, 20)
    expected = copy.deepcopy(model).double()(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert_close("autocast", out.logits, expected, scale=8)  # roundings of three layers
    low = copy.deepcopy(model).bfloat16()
    assert low.backbone.layers[1].mixer.A_log.dtype == torch.float32
    out = low(ids, labels=ids)
    out.loss.backward()
    assert_close("bfloat16", out.logits, expected, scale=8)  # the weights are rounded as well


# ---------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("num_experts", [1, 4])
def test_prefill_and_steps_equal_forward(num_experts):
    model, ids = make(num_experts=num_experts, top_k=1), tokens(2, 12)
    expected = model(ids).logits
    cache = model.allocate_cache(2)
    with torch.no_grad():
        prefill = model(ids[:, :7], cache=cache)
    assert prefill.cache is cache
    steps = [model.step(ids[:, t], cache) for t in range(7, 12)]
    assert_close("logits", torch.cat([prefill.logits, torch.stack(steps, 1)], 1), expected, scale=4)


def test_cache_copies():
    model, ids = make(), tokens(2, 6)
    cache = model.allocate_cache(2)
    assert len(cache) == 3 and cache.batch == 2 and cache.ssm.dtype == torch.float32
    empty = cache.clone()
    with torch.no_grad():
        model(ids, cache=cache)
        swapped = cache.select([1, 0, 1])
        logits = model.step(ids[[0, 1, 0], 0], swapped)
        assert_close("selected", logits[:2], model.step(ids[[0, 1], 0], cache.select([1, 0])))
    assert not empty.ssm.any() and cache.ssm.any()
    cache.reset()
    assert not cache.ssm.any() and not cache.conv.any()


def test_truncated_backpropagation_through_a_cache():
    model, ids = make(), tokens(2, 8)
    cache = model.allocate_cache(2)
    for part in ids.split(4, dim=1):
        model(part, labels=part, cache=cache).loss.backward()
    assert not cache.ssm.requires_grad


# -------------------------------------------------------------------------------------------------- torch's machinery
def test_compiles():
    model, ids = make(n_layer=2), tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the whole graph, without 20 s of codegen
    compiled(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, expected[name])


def test_initialisation():
    model = make(d_model=64, n_layer=4, bias=True)
    assert 0.019 < model.backbone.embedding.weight.std() < 0.021
    mixer = model.backbone.layers[0].mixer
    assert mixer.out_proj.weight.abs().max() <= 128**-0.5 / 2 < mixer.in_proj.weight.abs().max()
    assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
    assert torch.isfinite(model(tokens(2, 5), labels=tokens(2, 5)).loss)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(tokens(9)), ValueError, r"input_ids of shape \(batch, length\), got \(9,\)"),
        (lambda m: m(torch.rand(2, 9)), TypeError, "input_ids of integers, got torch.float32"),
        (lambda m: m(tokens(2, 9), labels=tokens(2, 8)), ValueError, r"labels of input_ids' shape \(2, 9\)"),
        (lambda m: m(tokens(2, 9), labels=tokens(2, 9), logits_to_keep=1), ValueError, "0 with labels, got 1"),
        (lambda m: m(tokens(2, 9), cache=m.allocate_cache(3)), ValueError, "2 sequences, got one of 3 and 3"),
        (lambda m: m.step(tokens(2, 1), m.allocate_cache(2)), ValueError, r"token_ids of shape \(batch,\)"),
        (lambda m: m.step(tokens(2), make(n_layer=1).allocate_cache(2)), ValueError, "3 layers and 2 seq"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


def test_examples(run_doctests):
    run_doctests(language_model)
    assert rom.models.RoutingMambaLM is RoutingMambaLM
