"""rom.compat.transformers: Hugging Face's models give what they gave before."""

from contextlib import nullcontext

import pytest
import torch
from tolerance import assert_close

pytest.importorskip("transformers")

import rom.compat.transformers as compat


def mamba(**options):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    return MambaForCausalLM(MambaConfig(**sizes | options))


def falcon_mamba():
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    return FalconMambaForCausalLM(FalconMambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=8))


def jamba():
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, num_experts=2, attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False, mamba_dt_rank=4,
    )  # fmt: skip
    return JambaForCausalLM(config)


def zamba():
    from transformers import ZambaConfig, ZambaForCausalLM

    config = ZambaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
        mamba_dt_rank=4, n_mamba_heads=2,
    )  # fmt: skip
    return ZambaForCausalLM(config)


MODELS = {"mamba": mamba, "falcon_mamba": falcon_mamba, "jamba": jamba, "zamba": zamba}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]().eval()


def test_logits(model):
    tokens = torch.randint(1, 40, (2, 13))
    expected = model(tokens).logits
    with torch.no_grad(), compat.enable():
        assert_close("logits", model(tokens).logits, expected.double(), scale=3)  # both are float32


def test_padding(model):
    tokens, mask = torch.randint(1, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(tokens, attention_mask=mask).logits[:, 4:]
    with torch.no_grad(), compat.enable():
        assert_close("logits", model(tokens, attention_mask=mask).logits[:, 4:], expected.double(), scale=3)


def test_generate(model):
    tokens = torch.randint(1, 40, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    with compat.enable():
        assert torch.equal(model.generate(tokens, **options), expected)


def test_a_training_step(model):
    tokens, losses = torch.randint(1, 40, (2, 9)), []
    gradients = []
    model.train()
    for on in (False, True):
        model.zero_grad()
        with compat.enable() if on else nullcontext():
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close("loss", losses[1], losses[0].double(), scale=3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(name, gradients[1][name], gradient.double(), scale=20)  # both are float32, through all layers


def test_it_is_undone():
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    outer = compat.enable("mamba")
    with compat.enable() as inner:  # the rest
        assert inner.models == ("falcon_mamba", "jamba", "zamba")
    assert modeling_mamba.mamba_selective_scan is compat.mamba_selective_scan
    outer.disable()
    outer.disable()
    assert modeling_mamba.mamba_selective_scan is before


def test_versions_without_these_functions_are_named(monkeypatch):
    from transformers.models.jamba import modeling_jamba

    monkeypatch.delattr(modeling_jamba, "mamba_selective_scan")
    with pytest.raises(compat.UnsupportedTransformers, match="has no mamba_selective_scan in its jamba model"):
        compat.enable()
    with compat.enable("mamba") as enabled:
        assert enabled.models == ("mamba",)
    with pytest.raises(ValueError, match="got gpt2"):
        compat.enable("gpt2")


def test_examples(run_doctests):
    run_doctests(compat)
