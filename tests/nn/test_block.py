import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, errors

import rom
from rom.nn import block as block_module
from rom.nn import norm as norm_module

SUBSETS = [("in",), ("gate",), ("out",), ("in", "gate"), ("in", "out"), ("gate", "out"), ("in", "gate", "out")]
FLOAT32 = ("A_log", "D", "dt_proj.bias", "router.weight")
DENSE_KEYS = {
    "in_proj.weight": (64, 16),
    "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,),
    "x_proj.weight": (1 + 2 * 16, 32),
    "dt_proj.weight": (32, 1),
    "dt_proj.bias": (32,),
    "A_log": (32, 16),
    "D": (32,),
    "out_proj.weight": (16, 32),
}


def make(dtype=torch.float32, **options):
    block = rom.RoutingMambaBlock(**{"d_model": 16, "num_experts": 4, "top_k": 2, **options}).to(dtype)
    with torch.no_grad():  # off the symmetric start: A = −(1…N) and D = 1 hide mistakes
        for parameter in (block.A_log, block.D, block.dt_proj.bias):
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if block.router is not None:
            block.router.weight.mul_(4)  # clear decisions
    return block


def dense(**options):
    return make(num_experts=1, top_k=1, **options)


def formula(block, hidden):
    """The paper's equations over all experts, masked; every sequence step in a Python loop."""
    tokens = hidden.reshape(-1, block.d_model)
    probs = torch.softmax(tokens @ block.router.weight.T, -1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(block.top_k).indices, 1)
    weights = chosen * probs * block.routed_scale

    def mixture(x, weight, mask):
        return torch.einsum("ti,eoi,te->to", x, weight, mask)

    x, z = mixture(tokens, block.in_proj.weight, chosen).view(*hidden.shape[:2], -1).chunk(2, -1)
    padded = F.pad(x.transpose(1, 2), (block.d_conv - 1, 0))
    u = F.silu(F.conv1d(padded, block.conv1d.weight, block.conv1d.bias, groups=block.d_inner)).transpose(1, 2)
    dt, B, C = (u @ block.x_proj.weight.T).split([block.dt_rank, block.d_state, block.d_state], -1)
    delta = F.softplus(dt @ block.dt_proj.weight.T + block.dt_proj.bias)
    A = -block.A_log.exp()
    state, ys = torch.zeros(hidden.shape[0], block.d_inner, block.d_state, dtype=hidden.dtype), []
    for t in range(hidden.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1) + block.D * u[:, t])
    gated = (torch.stack(ys, 1) * F.silu(z)).reshape(-1, block.d_inner)
    return mixture(gated, block.out_proj.weight, weights).view(hidden.shape)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_is_the_papers_formula(top_k):
    block = make(torch.float64, top_k=top_k)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    got, expected = block(hidden), formula(block, hidden)
    assert_close("out", got, expected)
    inputs, grad = [hidden, *block.parameters()], torch.randn_like(got)
    for name, g, e in zip(
        ["hidden", *dict(block.named_parameters())],
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
    ):
        assert_close(f"{name}.grad", g, e)


@pytest.mark.parametrize("experts_on", SUBSETS, ids="+".join)
def test_gradcheck(experts_on):
    block = make(torch.float64, d_model=5, d_state=3, expand=1, bias=True, num_experts=3, experts_on=experts_on)
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    names = list(dict(block.named_parameters()))

    def run(hidden, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters)), (hidden,))

    assert torch.autograd.gradcheck(run, (hidden, *block.parameters()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_rows_equal_token_rows(top_k):
    """The sequence stage absorbs the permutation, or the projections do: the same block."""
    block = make(top_k=top_k)
    hidden = torch.randn(2, 33, 16, requires_grad=True)
    results = {}
    for rows in ("expert", "token"):
        block._inner_rows = rows
        out = block(hidden)
        results[rows] = [out, *torch.autograd.grad(out.square().sum(), [hidden, *block.parameters()])]
    for i, (expert, token) in enumerate(zip(results["expert"], results["token"])):
        assert_close(f"result {i}", expert, token, scale=4)  # two float32 results, one sum in another order


@pytest.mark.parametrize("experts_on", SUBSETS, ids="+".join)
def test_all_experts_equal_one_dense_block(experts_on):
    """K = E at W_r = 0: sums of the unweighted projections, and the mean (R = 1/E) of the weighted ones."""
    block = make(torch.float64, num_experts=3, top_k=3, experts_on=experts_on, bias=True)
    with torch.no_grad():
        block.router.weight.zero_()
    merged = {}
    for name, parameter in block.named_parameters():
        if name.startswith(("in_proj", "out_proj")) and parameter.dim() == (2 if name.endswith("bias") else 3):
            weighted = name.startswith("out") or "out" not in experts_on
            parameter = parameter.mean(0) if weighted else parameter.sum(0)  # noqa: PLW2901
        merged[name] = parameter.detach()
    del merged["router.weight"]
    for part in ("weight", "bias"):
        if f"in_proj_x.{part}" in merged:
            merged[f"in_proj.{part}"] = torch.cat([merged.pop(f"in_proj_x.{part}"), merged.pop(f"in_proj_z.{part}")])
    hidden = torch.randn(2, 11, 16, dtype=torch.float64)
    assert_close("out", block(hidden), rom.RoutingMambaBlock.from_mamba(merged)(hidden))


def test_one_expert_is_mamba():
    block = dense()
    assert block.router is None and block.route(torch.randn(3, 16)) is None
    assert {name: tuple(p.shape) for name, p in block.state_dict().items()} == DENSE_KEYS
    hidden = torch.randn(2, 8, 16)
    out, routing = block(hidden, return_routing=True)
    assert routing is None and out.shape == hidden.shape and block.load_statistics() is None


@pytest.mark.parametrize("experts_on", SUBSETS, ids="+".join)
def test_parameters(experts_on):
    shapes = {name: tuple(p.shape) for name, p in make(bias=True, experts_on=experts_on).state_dict().items()}
    x, z, out = ((4,) if name in experts_on else () for name in ("in", "gate", "out"))
    if x == z:
        assert shapes["in_proj.weight"] == (*x, 64, 16) and shapes["in_proj.bias"] == (*x, 64)
    else:
        assert shapes["in_proj_x.weight"] == (*x, 32, 16) and shapes["in_proj_z.weight"] == (*z, 32, 16)
    assert shapes["out_proj.weight"] == (*out, 16, 32) and shapes["out_proj.bias"] == (*out, 16)
    assert shapes["router.weight"] == (4, 16)


def test_mamba_initialisation():
    block = rom.RoutingMambaBlock(64, d_state=8, dt_min=0.01, dt_max=0.05)
    assert torch.equal(block.A_log, torch.arange(1, 9.0).log().expand(128, 8))
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() >= 0.01 * 0.999 and dt.max() <= 0.05 * 1.001 and dt.std() > 0.005
    assert block.dt_proj.weight.abs().max() <= 4**-0.5
    assert block.A_log._no_weight_decay and block.D._no_weight_decay and block.dt_proj.bias._no_reinit
    positional = rom.RoutingMambaBlock(64, 8, 4, 2, "auto", 0.01, 0.05, "constant", 1.0, 1e-4, False, True)
    assert positional.conv1d.bias is None and positional.in_proj.bias is not None
    assert torch.equal(positional.dt_proj.weight, torch.full((128, 4), 0.5))


# ------------------------------------------------------------------------------------------------ sequences and states
@pytest.mark.parametrize("num_experts", [1, 4])
def test_packed_equals_separate(num_experts):
    block = make(num_experts=num_experts, top_k=1)
    lengths = [5, 1, 12, 2]
    hidden = torch.randn(1, sum(lengths), 16)
    cu_seqlens = torch.tensor([0, 5, 6, 18, 20], dtype=torch.int32)
    separate = torch.cat([block(part) for part in hidden.split(lengths, dim=1)], dim=1)
    assert_close("out", block(hidden, cu_seqlens=cu_seqlens), separate)

    cache = block.allocate_inference_cache(4)
    block(hidden, cache, cu_seqlens)
    for i, part in enumerate(hidden.split(lengths, dim=1)):
        alone = block.allocate_inference_cache(1)
        block(part, alone)
        assert_close("conv state", cache[0][i], alone[0][0])
        assert_close("ssm state", cache[1][i], alone[1][0])


@pytest.mark.parametrize("num_experts", [1, 4])
def test_step_equals_forward(num_experts):
    block = make(num_experts=num_experts, top_k=min(2, num_experts))
    hidden = torch.randn(3, 10, 16)
    conv_state, ssm_state = block.allocate_inference_cache(3, max_seqlen=10)
    with torch.no_grad():
        steps = [block.step(hidden[:, t : t + 1], conv_state, ssm_state)[0] for t in range(10)]
    assert_close("out", torch.cat(steps, 1), block(hidden))


def test_chunks_equal_whole():
    block = make()
    hidden = torch.randn(2, 21, 16)
    cache = block.allocate_inference_cache(2)
    chunks = torch.cat([block(part, cache) for part in hidden.split([7, 1, 2, 11], dim=1)], 1)
    assert_close("out", chunks, block(hidden))
    chunks.sum().backward()  # the cache moved on, yet autograd kept what it needs
    with torch.no_grad():
        several = block.step(hidden[:, :3], *block.allocate_inference_cache(2))[0]
    assert_close("three tokens in one step", several, block(hidden[:, :3]))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_empty(shape, num_experts):
    block = make(num_experts=num_experts, top_k=1)
    hidden = torch.randn(shape, requires_grad=True)
    block(hidden).sum().backward()
    assert hidden.grad.shape == shape


def test_routing_in_and_out():
    block, other = make(), make()
    hidden = torch.randn(2, 7, 16)
    out, routing = block(hidden, return_routing=True)
    assert torch.equal(routing.indices, block.route(hidden).indices)
    assert torch.equal(block(hidden, routing=routing), out)
    shared, passed = other(hidden, routing=routing, return_routing=True)
    assert passed is routing and not torch.equal(shared, other(hidden))


def test_load_statistics():
    block = make()
    assert block.load_statistics() is None
    _, routing = block(torch.randn(3, 20, 16), return_routing=True)
    statistics = block.load_statistics()
    assert_close("fraction", statistics.fraction, torch.bincount(routing.indices.flatten(), minlength=4) / 120)
    assert_close("probability", statistics.probability, routing.probs.mean(0))
    assert statistics.dropped == 0 and not statistics.probability.requires_grad


# ------------------------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "type", "constructor"])
def test_what_stays_float32(cast):
    low = torch.float16 if cast == "half" else torch.bfloat16
    if cast == "constructor":
        block = rom.RoutingMambaBlock(16, dtype=low)
    else:
        block = make()
        before = {name: block.get_parameter(name).clone() for name in FLOAT32}
        getattr(block, cast)(*([low] if cast in ("to", "type") else []))
        assert all(torch.equal(block.get_parameter(name), before[name]) for name in FLOAT32)
    dtypes = {name: p.dtype for name, p in block.named_parameters()}
    assert all(dtypes[name] == torch.float32 for name in FLOAT32)
    assert {dtype for name, dtype in dtypes.items() if name not in FLOAT32} == {low}
    assert block.A_log._no_weight_decay


def test_moves_and_widens():
    block = make()
    block(torch.randn(1, 3, 16)).sum().backward()
    block.bfloat16()
    assert block.A_log.grad.dtype == torch.float32 and block.in_proj.weight.grad.dtype == torch.bfloat16
    assert {p.dtype for p in block.double().parameters()} == {torch.float64}
    meta = make().to("meta", torch.bfloat16)
    assert meta.A_log.device.type == "meta" and meta.A_log.dtype == torch.float32
    assert meta.to_empty(device="cpu").D._no_weight_decay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    block = make(top_k=4)  # all experts: rounding cannot flip a decision
    hidden = torch.randn(2, 30, 16)
    rounded = copy.deepcopy(block).to(dtype).double()  # what the low-precision block is really given
    expected = rounded(hidden.to(dtype).double())
    plain = formula(_all_in(rounded, dtype), hidden.to(dtype))
    out = copy.deepcopy(block).to(dtype)(hidden.to(dtype))
    assert out.dtype == dtype
    assert_close("out", out, expected, plain)
    with torch.autocast("cpu", dtype=dtype):
        out = rounded.float()(hidden.to(dtype).float())
    assert out.dtype == dtype
    assert_close("autocast", out, expected, plain)


def _all_in(block, dtype):
    """A copy with every parameter in `dtype`, also those that would stay float32."""
    block = copy.deepcopy(block)
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    return block


def test_router_is_float32_under_autocast():
    block, hidden = make(), torch.randn(4, 50, 16)
    expected = block.router_logits(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, routing = block.router_logits(hidden), block.route(hidden)
    assert torch.equal(got, expected) and torch.equal(routing.indices, block.route(hidden).indices)
    assert make().bfloat16().router_logits(hidden.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- upcycling
@pytest.mark.parametrize("experts_on", SUBSETS, ids="+".join)
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 3}, {"top_k": 2, "normalize": True}], ids=str)
def test_upcycled_block_starts_at_the_dense_one(experts_on, options):
    source = dense(dtype=torch.float64, bias=True)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    upcycled = rom.RoutingMambaBlock.from_mamba(source, num_experts=4, experts_on=experts_on, **options)
    assert upcycled.routed_scale == (1 if options.get("normalize") else 4 / options["top_k"])
    assert errors(upcycled(hidden), source(hidden))[0] < 0.1  # the router starts near zero,
    with torch.no_grad():
        upcycled.router.weight.zero_()
    assert_close("out", upcycled(hidden), source(hidden))  # and at zero there is no difference


def test_upcycling_noise():
    source = dense()
    weight = rom.RoutingMambaBlock.from_mamba(source, num_experts=4, noise=0.1).in_proj.weight
    relative = (weight - source.in_proj.weight).std() / source.in_proj.weight.std()
    assert 0.08 < relative < 0.12 and not torch.equal(weight[0], weight[1])


def test_from_mamba_errors():
    state = dense().state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "A_log"}
    with pytest.raises(ValueError, match=r"missing A_log; unexpected norm\.weight"):
        rom.RoutingMambaBlock.from_mamba({**without, "norm.weight": state["D"]})
    with pytest.raises(ValueError, match=r"expected x_proj\.weight of shape \(33, 32\), got \(32, 32\)"):
        rom.RoutingMambaBlock.from_mamba({**state, "x_proj.weight": torch.ones(32, 32)})


# -------------------------------------------------------------------------------------------------- torch's machinery
def test_compile_and_export():
    block, hidden = make(), torch.randn(2, 6, 16)
    expected = torch.autograd.grad(block(hidden).square().sum(), list(block.parameters()))
    compiled = torch.compile(block, fullgraph=True)
    got = torch.autograd.grad(compiled(hidden).square().sum(), list(block.parameters()))
    for name, g, e in zip(dict(block.named_parameters()), got, expected):
        assert_close(name, g, e, scale=4)  # the compiler fuses and reorders
    assert block.load_statistics() is not None
    program = torch.export.export(block, (hidden,))
    assert_close("exported", program.module()(hidden), block(hidden))


def test_copies_and_round_trips():
    block, hidden = make(), torch.randn(1, 5, 16)
    expected = block(hidden)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(hidden), expected) and other.A_log._no_weight_decay
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other = make()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(hidden), expected)


def test_deterministic_whatever_the_thread_count():
    block, hidden = make(), torch.randn(4, 65, 16, requires_grad=True)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = block(hidden)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [hidden, *block.parameters()])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_jitter_perturbs_the_router_in_training_only():
    block, plain = make(router_jitter=0.1), make()
    plain.load_state_dict(block.state_dict())
    hidden = torch.randn(2, 50, 16)
    exact = plain.router_logits(hidden)
    assert torch.equal(block.eval().router_logits(hidden), exact)
    jittered = block.train().router_logits(hidden)
    assert not torch.equal(jittered, exact) and not torch.equal(jittered, block.router_logits(hidden))
    bound = 0.1 * hidden.reshape(-1, 16).abs() @ plain.router.weight.abs().T  # |Σ ε x w| ≤ 0.1 Σ |x| |w|
    assert bool(((jittered - exact).abs() <= bound * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_experts": 0}, "num_experts >= 1, got 0"),
        ({"top_k": 5}, "1 <= top_k <= num_experts, got top_k=5 and num_experts=4"),
        ({"top_k": 0}, "1 <= top_k <= num_experts"),
        ({"experts_on": ("in", "x_proj")}, "experts_on of .*, got x_proj"),
        ({"experts_on": ()}, "experts_on to name a projection"),
        ({"num_experts": 1, "top_k": 1, "routed_scale": 2.0}, "routed_scale=1 with one expert"),
        ({"router_jitter": 1.0}, "0 <= router_jitter < 1, got 1.0"),
        ({"d_model": 0}, "d_model >= 1, got 0"),
        ({"d_state": 2.5}, "d_state >= 1, got 2.5"),
        ({"dt_init": "normal"}, "dt_init 'random' or 'constant', got 'normal'"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        rom.RoutingMambaBlock(**{"d_model": 16, "num_experts": 4, **options})


def test_call_errors():
    block = make()
    hidden = torch.randn(2, 5, 16)
    for call in (block, lambda hidden: block.step(hidden, *block.allocate_inference_cache(2))):
        for bad in (torch.randn(2, 5, 8), torch.randn(5, 16)):
            with pytest.raises(ValueError, match=r"expected hidden of shape \(batch, \w+, 16\), got"):
                call(bad)
    with pytest.raises(ValueError, match="expected a routing of 10 tokens over 4 experts, got one of 8 over 4"):
        block(hidden, routing=block.route(hidden[:, :4]))
    with pytest.raises(ValueError, match="over 4 experts, got one of 10 over 3"):
        block(hidden, routing=make(num_experts=3).route(hidden))
    with pytest.raises(TypeError, match=r"routing to be a rom\.Routing, got tuple"):
        block(hidden, routing=tuple(block.route(hidden)))
    with pytest.raises(ValueError, match="expected routing=None"):
        dense()(hidden, routing=block.route(hidden))
    with pytest.raises(ValueError, match="has no router"):
        dense().router_logits(hidden)
    with pytest.raises(ValueError, match="initial_state"):
        block(hidden, block.allocate_inference_cache(3))


@pytest.mark.parametrize("module", [block_module, norm_module], ids=lambda m: m.__name__)
def test_examples(module, run_doctests):
    run_doctests(module)
