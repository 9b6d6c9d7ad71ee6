"""rom.compat.mamba_ssm: the original's names, arguments and layouts."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compat_cases import conv, scan
from tolerance import assert_close

import rom
import rom.compat
from rom.compat import mamba_ssm
from rom.compat.mamba_ssm.models.config_mamba import MambaConfig
from rom.compat.mamba_ssm.modules.mamba_simple import Block, Mamba
from rom.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from rom.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from rom.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from rom.compat.mamba_ssm.utils.generation import InferenceParams

BATCH, DIM, LENGTH, STATE = 2, 6, 11, 4


def problem(groups=1):
    values = {"u": torch.randn(BATCH, DIM, LENGTH), "delta": torch.randn(BATCH, DIM, LENGTH)}
    values |= {"A": -torch.rand(DIM, STATE) - 0.1, "B": torch.randn(BATCH, groups, STATE, LENGTH)}
    values |= {"C": torch.randn(BATCH, groups, STATE, LENGTH), "D": torch.randn(DIM)}
    return values | {"z": torch.randn(BATCH, DIM, LENGTH), "delta_bias": torch.randn(DIM)}


# ------------------------------------------------------------------------------------------------ selective_scan_fn
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_selective_scan_fn(groups):
    values = problem(max(groups, 1))
    given = values if groups else values | {"B": values["B"][:, 0], "C": values["C"][:, 0]}
    given = {name: x.requires_grad_() for name, x in given.items()}
    out, last = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    double = {name: x.detach().double().requires_grad_() for name, x in values.items()}
    expected, state = scan(**double, delta_softplus=True)
    assert out.shape == (BATCH, DIM, LENGTH) and last.shape == (BATCH, DIM, STATE)
    assert_close("out", out, expected)
    assert_close("last_state", last, state)
    grads = torch.randn_like(out), torch.randn_like(last)
    got = torch.autograd.grad((out, last), list(given.values()), grads)
    wanted = torch.autograd.grad((expected, state), list(double.values()), [g.double() for g in grads])
    for name, g, e in zip(given, got, wanted):
        assert_close(f"{name}.grad", g, e.view(g.shape))


def test_nothing_optional():
    values = {name: problem()[name] for name in ("u", "delta", "A", "B", "C")}
    out = selective_scan_fn(**values | {"delta": values["delta"].abs()})
    expected, _ = scan(**{n: x.double() for n, x in values.items()} | {"delta": values["delta"].abs().double()})
    assert isinstance(out, torch.Tensor)
    assert_close("out", out, expected)


def test_time_invariant_coefficients():
    values = problem()
    B, C = torch.randn(2, DIM, STATE)
    out = selective_scan_fn(values["u"], values["delta"].abs(), values["A"], B, C)
    by_time = [x[None, None].expand(BATCH, 1, DIM, STATE).double() for x in (B, C)]
    u, delta, A = (values[name].double() for name in ("u", "delta", "A"))
    delta, sizes = delta.abs(), (BATCH, 1, STATE, LENGTH)
    B, C = (x.unbind(2) for x in by_time)
    one = [
        scan(
            u[:, d : d + 1], delta[:, d : d + 1], A[d : d + 1], *(x[:, :, d, :, None].expand(*sizes) for x in by_time)
        )[0]
        for d in range(DIM)
    ]
    assert_close("out", out, torch.cat(one, 1))


def test_complex_states():
    values = problem()
    A = torch.complex(values["A"], torch.randn(DIM, STATE))
    B, C = torch.randn(2, BATCH, STATE, 2 * LENGTH)
    with rom.backend("reference"):
        out = selective_scan_fn(values["u"], values["delta"].abs(), A, B, C)
    pairs = [torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))[:, None] for x in (B, C)]
    expected, _ = scan(values["u"].double(), values["delta"].abs().double(), A.to(torch.complex128), *pairs)
    assert_close("out", out, expected)


# ------------------------------------------------------------------------------------------------ mamba_inner_fn
@pytest.mark.parametrize("norms", [False, True])
def test_mamba_inner_fn(norms):
    rank, width = 3, 4
    shapes = [(BATCH, 2 * DIM, LENGTH), (DIM, 1, width), (DIM,), (rank + 2 * STATE, DIM), (DIM, rank), (5, DIM), (5,)]
    xz, weight, bias, x_proj, dt_proj, out_proj, out_bias = (torch.randn(*shape) / 2 for shape in shapes)
    A, D, delta_bias = -torch.rand(DIM, STATE) - 0.1, torch.randn(DIM), torch.randn(DIM)
    extra = {"B_proj_bias": torch.randn(STATE), "C_proj_bias": torch.randn(STATE)}
    if norms:
        sizes = {"b_rms_weight": STATE, "c_rms_weight": STATE, "dt_rms_weight": rank}
        extra |= {name: torch.rand(size) + 0.5 for name, size in sizes.items()}
    tensors = (xz, weight, bias, x_proj, dt_proj, out_proj, out_bias, A, None, None, D, delta_bias)
    out = mamba_inner_fn(*tensors, **extra)

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], extra[name].double(), 1e-6) if norms else x

    x, z = xz.double().chunk(2, 1)
    u = F.silu(conv(x, weight[:, 0].double(), bias.double()))
    dt, B, C = F.linear(u.mT, x_proj.double()).split([rank, STATE, STATE], -1)
    B, C = (norm(v + extra[f"{n}_proj_bias"].double(), f"{n.lower()}_rms_weight") for v, n in ((B, "B"), (C, "C")))
    delta = F.linear(norm(dt, "dt_rms_weight"), dt_proj.double()).mT
    y, _ = scan(u, delta, A.double(), B.mT[:, None], C.mT[:, None], D.double(), z, delta_bias.double(), True)
    assert_close("out", out, F.linear(y.mT, out_proj.double(), out_bias.double()), scale=2)  # two products on the way


def test_mamba_inner_fn_of_complex_states():
    rank = 3
    xz, weight = torch.randn(BATCH, 2 * DIM, LENGTH), torch.randn(DIM, 1, 4)
    x_proj, dt_proj, out_proj = torch.randn(rank + 4 * STATE, DIM) / 3, torch.randn(DIM, rank) / 3, torch.randn(5, DIM)
    A = torch.complex(-torch.rand(DIM, STATE) - 0.1, torch.randn(DIM, STATE))
    with rom.backend("reference"):
        out = mamba_inner_fn(xz, weight, None, x_proj, dt_proj, out_proj, None, A)
    x, z = xz.double().chunk(2, 1)
    u = F.silu(conv(x, weight[:, 0].double(), None))
    dt, B, C = F.linear(u.mT, x_proj.double()).split([rank, 2 * STATE, 2 * STATE], -1)
    B, C = (torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()).mT[:, None] for v in (B, C))
    y, _ = scan(u, F.linear(dt, dt_proj.double()).mT, A.to(torch.complex128), B, C, z=z, delta_softplus=True)
    assert_close("out", out, F.linear(y.mT, out_proj.double()), scale=2)  # two products on the way


# ------------------------------------------------------------------------------------------------ state update
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [0, 3])
def test_selective_state_update(heads, dtype):
    lead = (heads,) if heads else ()
    state = torch.randn(BATCH, *lead, DIM, STATE).to(dtype)
    x, dt, z = torch.randn(3, BATCH, *lead, DIM)
    A, D, bias = -torch.rand(*lead, DIM, STATE), torch.randn(*lead, DIM), torch.randn(*lead, DIM)
    B, C = torch.randn(2, BATCH, STATE)
    before = state.double()
    out = selective_state_update(state, x, dt, A, B, C, D, z, bias, dt_softplus=True)
    delta = F.softplus(dt.double() + bias.double())[..., None]
    expand = (slice(None), *(None,) * len(lead), None)
    h = torch.exp(delta * A.double()) * before + delta * B.double()[expand] * x.double()[..., None]
    y = ((h * C.double()[expand]).sum(-1) + D.double() * x.double()) * F.silu(z.double())
    assert_close("out", out, y)
    assert_close("state", state, h)


# ------------------------------------------------------------------------------------------------ norms
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norms(rms, bias):
    x, residual, weight = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.rand(8)
    offset = torch.randn(8) if bias else None
    y, total = layer_norm_fn(x, weight, offset, residual, 1e-5, prenorm=True, is_rms_norm=rms)
    s = (x + residual).double()
    expected = F.rms_norm(s, (8,), weight.double(), 1e-5) if rms else F.layer_norm(s, (8,), weight.double(), None, 1e-5)
    assert_close("y", y, expected if offset is None else expected + offset.double())
    assert_close("sum", total, s)
    norm = RMSNorm(8)
    assert norm.bias is None and torch.equal(norm(x), rms_norm_fn(x, norm.weight, eps=norm.eps))


# ------------------------------------------------------------------------------------------------ modules
def test_mamba_is_the_dense_block():
    mamba = Mamba(16, 8, 4, 2, "auto", 0.001, 0.1, "random", 1.0, 1e-4, True, False, True, 3)
    block = rom.RoutingMambaBlock(16, 8, num_experts=1)
    assert mamba.layer_idx == 3 and mamba.use_fast_path
    assert {k: v.shape for k, v in mamba.state_dict().items()} == {k: v.shape for k, v in block.state_dict().items()}
    block.load_state_dict(mamba.state_dict())
    x = torch.randn(2, 9, 16)
    assert torch.equal(mamba(x), block(x))


def test_decoding_through_inference_params():
    mamba, x = Mamba(16, layer_idx=0), torch.randn(2, 9, 16)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    parts = []
    for begin, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        with torch.no_grad():
            parts.append(mamba(x[:, begin:end], inference_params=params))
        params.seqlen_offset = end
    assert_close("out", torch.cat(parts, 1), mamba(x).double(), scale=2)
    params.reset(9, 2)  # begins anew: the old states must not show
    with torch.no_grad():
        assert_close("again", mamba(x[:, :4], inference_params=params), parts[0].double())


def test_a_layer_without_a_number_is_told():
    with pytest.raises(ValueError, match="expected a layer_idx"):
        Mamba(16)(torch.randn(1, 2, 16), inference_params=InferenceParams(2, 1))


@pytest.mark.parametrize("rms_norm", [True, False])
def test_language_model(rms_norm, tmp_path):
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=30, rms_norm=rms_norm, ssm_cfg={"d_state": 8})
    model = mamba_ssm.MambaLMHeadModel(config)
    assert model.lm_head.weight is model.backbone.embedding.weight and model.lm_head.weight.shape[0] == 32
    tokens = torch.randint(30, (2, 7))
    logits = model(tokens).logits
    assert logits.shape == (2, 7, 32) and model(tokens, num_last_tokens=1).logits.shape == (2, 1, 32)
    model.save_pretrained(tmp_path)
    again = mamba_ssm.MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert torch.equal(again(tokens).logits, logits)
    logits[..., :30].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_its_state_dict_is_our_model_s():
    model = mamba_ssm.MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
    ours = rom.models.RoutingMambaLM.from_mamba(model.state_dict())
    tokens = torch.randint(32, (2, 7))
    assert_close("logits", ours(tokens).logits, model(tokens).logits.double())
    model.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.backbone.embedding.weight})


def test_generate():
    model = mamba_ssm.MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=32))
    tokens = torch.randint(32, (3, 5))
    out = model.generate(tokens, max_length=12, return_dict_in_generate=True)
    assert out.sequences.shape == (3, 12) and len(out.scores) == 7
    plain = tokens
    for _ in range(7):  # without any cache
        plain = torch.cat([plain, model(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, plain)
    stopped = model.generate(tokens, max_length=12, eos_token_id=int(plain[0, 5]))
    assert stopped.shape[1] <= 12 and stopped[0, 5:].unique().numel() == 1
    assert model.generate(tokens, 9, top_k=0, top_p=0.9, min_p=0.01, temperature=0.7, cg=True).shape == (3, 9)


@pytest.mark.parametrize("field", [{"ssm_cfg": {"layer": "Mamba2"}}, {"attn_layer_idx": [1]}, {"d_intermediate": 64}])
def test_what_is_not_here_is_told(field):
    with pytest.raises(ValueError, match=r"rom.compat.mamba_ssm: expected"):
        mamba_ssm.MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8, **field))
    with pytest.raises(ImportError, match="no Mamba2"):
        from rom.compat.mamba_ssm import Mamba2  # noqa: F401


def test_block():
    block = Block(16, Mamba, RMSNorm, residual_in_fp32=True)
    hidden, residual = block(torch.randn(2, 5, 16).bfloat16().float())
    assert hidden.shape == residual.shape == (2, 5, 16) and residual.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ install
CODE = """
import rom.compat
assert rom.compat.install() == ("mamba_ssm", "causal_conv1d") == rom.compat.install()
import torch, mamba_ssm
from mamba_ssm import Mamba
from mamba_ssm.modules.mamba_simple import Mamba as same
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
import rom.compat.mamba_ssm.modules.mamba_simple as ours
assert Mamba is same is ours.Mamba and mamba_ssm.__version__ and ours.__spec__.name.startswith("rom.")
print(Mamba(d_model=16, d_state=16, d_conv=4, expand=2)(torch.randn(2, 5, 16)).shape)
rom.compat.uninstall()
try:
    import mamba_ssm.modules
except ImportError:
    print("gone")
"""


def test_install(tmp_path):  # not from the root, which holds unbuilt sources
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.stdout.split("\n")[:2] == ["torch.Size([2, 5, 16])", "gone"], run.stderr


def test_a_real_package_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert rom.compat.install() == ("causal_conv1d",)
        import mamba_ssm as found

        assert found.real
    finally:
        rom.compat.uninstall()
        sys.modules.pop("mamba_ssm", None)


def test_unknown_packages_are_refused():
    with pytest.raises(ValueError, match="got flash_attn"):
        rom.compat.install(["flash_attn"])


def test_examples(run_doctests):
    run_doctests(rom.compat)
