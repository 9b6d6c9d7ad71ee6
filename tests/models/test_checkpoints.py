import json
import sys

import pytest
import torch
from tolerance import assert_close, errors

from rom.models import RoutingMambaConfig, RoutingMambaLM

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


def make(**changes):
    fields = {"vocab_size": 30, "d_model": 32, "n_layer": 2, "num_experts": 4, **changes}
    return RoutingMambaLM(RoutingMambaConfig(**fields))


@pytest.fixture(scope="module")
def hugging_face():
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=256, num_hidden_layers=4, vocab_size=300, state_size=16)
    ).eval()
    with torch.no_grad():  # off the symmetric start, and logits far enough apart for one greedy path
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "mixer.D", "dt_proj.bias", "norm.weight", "norm_f.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


# ------------------------------------------------------------------------------------------------ from other packages
def test_one_expert_is_hugging_faces_mamba(hugging_face):
    model = RoutingMambaLM.from_mamba(hugging_face)
    assert model.config == RoutingMambaConfig(300, 256, 4, d_state=16, dt_rank=16, num_experts=1)
    ids = torch.randint(300, (2, 40))
    with torch.no_grad():
        got, expected = model(ids).logits, hugging_face(ids).logits
        assert errors(got, expected)[0] <= 1e-5
        cache = model.allocate_cache(2)
        steps = torch.stack([model.step(ids[:, t], cache) for t in range(40)], 1)
        assert errors(steps, expected)[0] <= 1e-5


def test_greedy_continuations_are_hugging_faces(hugging_face):
    model = RoutingMambaLM.from_mamba(hugging_face)
    ids = torch.randint(300, (2, 7))
    mask = torch.ones_like(ids)  # else generate masks tokens that happen to be the padding's
    expected = hugging_face.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, 64), expected)


def test_key_layouts(hugging_face, tmp_path):
    state = hugging_face.state_dict()
    mamba_ssm = {name.replace("embeddings", "embedding"): tensor for name, tensor in state.items()}
    untied = {**mamba_ssm, "lm_head.weight": torch.randn(300, 256)}
    expected, ids = RoutingMambaLM.from_mamba(state), torch.randint(300, (1, 9))
    torch.save(mamba_ssm, tmp_path / "pytorch_model.bin")
    hugging_face.save_pretrained(tmp_path / "hf")
    for source in (mamba_ssm, tmp_path / "pytorch_model.bin", str(tmp_path), tmp_path / "hf", expected):
        model = RoutingMambaLM.from_mamba(source)
        assert model.lm_head is None and torch.equal(model(ids).logits, expected(ids).logits)
    assert torch.equal(RoutingMambaLM.from_mamba(untied).lm_head.weight, untied["lm_head.weight"])
    assert RoutingMambaLM.from_mamba(state, vocab_size=290)(ids).logits.shape == (1, 9, 290)
    assert RoutingMambaLM.from_mamba(state, norm_epsilon=1e-6).config.norm_epsilon == 1e-6


def test_upcycling_starts_near_the_dense_model(hugging_face):
    dense = RoutingMambaLM.from_mamba(hugging_face)
    model = RoutingMambaLM.from_mamba(hugging_face, num_experts=4, top_k=2)
    assert model.config.routed_scale == 2 and model.num_parameters() > 2 * dense.num_parameters()
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.router.weight.zero_()
    assert_close("logits", model(ids).logits, dense(ids).logits, scale=4)  # two float32 results


def test_foreign_checkpoints_are_explained(hugging_face, tmp_path):
    state = hugging_face.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "backbone.layers.2.mixer.D"}
    with pytest.raises(ValueError, match=r"missing backbone\.layers\.2\.mixer\.D; unexpected backbone\.attn"):
        RoutingMambaLM.from_mamba({**missing, "backbone.attn": torch.ones(1)})
    with pytest.raises(ValueError, match="layers of equal shapes and width 8"):
        RoutingMambaLM.from_mamba({**state, "backbone.embeddings.weight": torch.ones(300, 8)})
    with pytest.raises(ValueError, match="expected vocab_size <= 300, got 301"):
        RoutingMambaLM.from_mamba(state, vocab_size=301)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        RoutingMambaLM.from_mamba(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RoutingMambaLM.from_mamba(tmp_path / "none.bin")
    (tmp_path / "junk.bin").write_bytes(b"junk")
    with pytest.raises(ValueError, match="damaged, truncated or no checkpoint"):
        RoutingMambaLM.from_mamba(tmp_path / "junk.bin")


# ------------------------------------------------------------------------------------------------------------- our own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(dtype, tmp_path):
    model = make(tie_embeddings=False, experts_on=("in", "out"), bias=True).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = RoutingMambaLM.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    for (name, expected), (other, got) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert name == other and got.dtype == expected.dtype and torch.equal(got, expected)
    assert loaded.backbone.layers[0].mixer.A_log._no_weight_decay
    ids = torch.randint(30, (1, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = RoutingMambaLM.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float16)
    assert half.lm_head.weight.dtype == torch.float16
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_folders_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved RoutingMambaLM"):
        RoutingMambaLM.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    tensors, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, fields = tensors.read_bytes(), json.loads(config.read_text())

    config.write_text(json.dumps({**fields, "n_layer": 3, "d_state": 8}))
    with pytest.raises(
        ValueError, match=r"missing backbone\.layers\.2.*A_log of shape \(64, 16\) instead of \(64, 8\)"
    ):
        RoutingMambaLM.from_pretrained(tmp_path)
    config.write_text(config.read_text()[:-9])
    with pytest.raises(ValueError, match="expected JSON"):
        RoutingMambaLM.from_pretrained(tmp_path)
    config.write_text(json.dumps(fields))
    for content in (whole[:-10], whole[:40], b"", whole[:8] + b"x" * 100):
        tensors.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, truncated or no checkpoint"):
            RoutingMambaLM.from_pretrained(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        RoutingMambaLM.from_pretrained(tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'rom-kernels\[train\]'"):
        make().save_pretrained(tmp_path)
