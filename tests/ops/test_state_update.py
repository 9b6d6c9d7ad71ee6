import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.ops import state_update
from rom.reference import state_update as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    batch,
    steps,
    dim,
    states,
    dtype=torch.float32,
    *,
    groups=None,
    constant=False,
    slots=None,
    optional=True,
    device="cpu",
):
    """Arguments as a dict. groups None: B and C without that dimension; constant: (dim, state)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (batch,) if steps is None else (batch, steps)

    def normal(*shape, dtype=compute):
        return torch.randn(shape, device=device).to(dtype)

    def coefficient():
        if constant:
            return normal(dim, states)
        return normal(*lead, *([] if groups is None else [groups]), states, dtype=dtype)

    return {
        "state": normal(slots or batch, dim, states),
        "u": normal(*lead, dim, dtype=dtype),
        "delta": normal(*lead, dim, dtype=dtype),
        "A": -torch.rand(dim, states, dtype=compute, device=device) - 0.1,
        "B": coefficient(),
        "C": coefficient(),
        "D": normal(dim) if optional else None,
        "z": normal(*lead, dim, dtype=dtype) if optional else None,
        "delta_bias": normal(dim) if optional else None,
        "delta_softplus": True,
    }


def to64(arguments):
    return {k: v.double().clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def compare(arguments):
    expected_arguments, plain_arguments = to64(arguments), arguments | {"state": arguments["state"].clone()}
    expected = reference.selective_state_update(**expected_arguments)
    plain = reference.selective_state_update(**plain_arguments)
    got = rom.ops.selective_state_update(**arguments)
    assert got.dtype == arguments["u"].dtype and got.shape == arguments["u"].shape
    assert_close("out", got, expected, plain)
    assert_close("state", arguments["state"], expected_arguments["state"], plain_arguments["state"])


@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize("states", [1, 8, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_float64(dtype, states, steps, device):
    compare(make(3, steps, 45, states, dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", ["float32", "like u"])
@pytest.mark.parametrize(
    "shape", [(128, None, 1536, 16), (3, 4, 250, 256), (2, 3, 77, 150), (5000, None, 8, 16)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_cuda_kernel(dtype, shape, parameters):
    """Several sequences per thread, whole packs and single elements; parameters are read in either dtype, uncast."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    a = make(*shape, dtype, device="cuda")
    if parameters == "like u":
        a |= {name: a[name].to(dtype) for name in ("D", "delta_bias")}
    else:
        a |= {name: a[name].to(a["A"].dtype) for name in ("B", "C")}
    with rom.backend("cuda"):
        states = [a["state"].clone() for _ in range(2)]
        runs = [rom.ops.selective_state_update(**(a | {"state": state})) for state in states]
        compare(a)
    assert torch.equal(*runs) and torch.equal(*states)


@pytest.mark.gpu
def test_cuda_graph_follows_the_indices():
    """The host never reads the indices: a captured step runs on whatever slots they name at replay."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    a = make(3, None, 200, 16, torch.bfloat16, slots=6, device="cuda")
    before = a["state"].clone()
    indices = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    with rom.backend("cuda"), torch.no_grad():
        rom.ops.selective_state_update(**a, state_indices=indices)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rom.ops.selective_state_update(**a, state_indices=indices)
        for names in ([4, -1, 0], [1, 2, 6]):
            a["state"].copy_(before)
            indices.copy_(torch.tensor(names))
            graph.replay()
            valid = [row for row, slot in enumerate(names) if 0 <= slot < 6]
            slots = [names[row] for row in valid]
            alone = before[slots].clone()
            rows = {k: a[k][valid] for k in ("u", "delta", "B", "C", "z")}
            assert torch.equal(out[valid], rom.ops.selective_state_update(**(a | rows | {"state": alone})))
            assert torch.equal(a["state"][slots], alone)
            others = [slot for slot in range(6) if slot not in slots]
            assert torch.equal(a["state"][others], before[others])
            if -1 in names:
                assert not out[names.index(-1)].any()
            if 6 in names:
                assert out[names.index(6)].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    steps=st.none() | st.integers(0, 4),
    groups=st.sampled_from([None, 1, 2, 4]),
    per_group=st.integers(1, 40),
    states=st.integers(1, 40),
    constant=st.booleans(),
    optional=st.booleans(),
    softplus=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(batch, steps, groups, per_group, states, constant, optional, softplus, seed):
    torch.manual_seed(seed)
    dim = 4 * per_group
    a = make(batch, steps, dim, states, groups=groups, constant=constant, optional=optional)
    a["delta"] = a["delta"].abs() * 0.1 if not softplus else a["delta"]
    compare(a | {"delta_softplus": softplus, "delta_bias": a["delta_bias"] if softplus else None})


def naive(a):
    """The formula, one number at a time."""
    state, u, delta, z = a["state"], a["u"], a["delta"] + a["delta_bias"], a["z"]
    out = torch.empty_like(u)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            for d in range(u.shape[2]):
                dt = torch.log1p(torch.exp(delta[b, t, d]))
                y = a["D"][d] * u[b, t, d]
                for n in range(a["A"].shape[1]):
                    state[b, d, n] = torch.exp(dt * a["A"][d, n]) * state[b, d, n] + dt * a["B"][b, t, n] * u[b, t, d]
                    y = y + a["C"][b, t, n] * state[b, d, n]
                out[b, t, d] = y * z[b, t, d] / (1 + torch.exp(-z[b, t, d]))
    return out


def test_is_the_formula():
    a = make(2, 3, 4, 3, torch.float64)
    expected_arguments = to64(a)
    expected = naive(expected_arguments)
    assert_close("out", rom.ops.selective_state_update(**a), expected)
    assert_close("state", a["state"], expected_arguments["state"])


def test_steps_equal_scan():
    a = make(2, 6, 40, 16)
    state = a.pop("state")
    with rom.backend("reference"):
        whole, final = rom.ops.selective_scan(**a, initial_state=state, return_final_state=True)
    outs = []
    for t in range(6):
        step = {k: a[k][:, t] for k in ("u", "delta", "B", "C", "z")}
        outs.append(rom.ops.selective_state_update(state, **(a | step)))
    assert_close("out", torch.stack(outs, 1), whole.double())
    assert_close("state", state, final.double())


def test_every_optional_argument_may_be_none(device):
    """mamba_ssm's function of the same name crashes without z, D or dt_bias on some paths."""
    a = make(2, None, 20, 16, device=device)
    for missing in (["D"], ["z"], ["delta_bias"], ["D", "z", "delta_bias"]):
        compare(a | dict.fromkeys(missing) | {"state": a["state"].clone()})


def test_state_indices(device):
    a = make(4, 2, 20, 16, slots=7, device=device)
    state = a.pop("state")
    before = state.clone()
    indices = torch.tensor([5, -1, 0, -7], dtype=torch.int32, device=device)
    out = rom.ops.selective_state_update(state, **a, state_indices=indices)
    assert not out[1].any() and not out[3].any()
    for row, slot in ((0, 5), (2, 0)):
        alone = before[slot : slot + 1].clone()
        single = a | {k: a[k][row : row + 1] for k in ("u", "delta", "B", "C", "z")}
        assert torch.equal(out[row], rom.ops.selective_state_update(alone, **single)[0])
        assert torch.equal(state[slot], alone[0])
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(state[untouched], before[untouched])


def test_strided_state_and_views(device):
    a = make(3, 2, 24, 16, device=device)
    layers = torch.randn(3, 2, 24, 16, device=device)
    layers[:, 1] = a["state"]
    both = torch.cat([a["u"], a["z"]], -1)
    u, z = both.chunk(2, -1)
    got = rom.ops.selective_state_update(**(a | {"state": layers[:, 1], "u": u, "z": z}))
    assert torch.equal(got, rom.ops.selective_state_update(**a)) and torch.equal(layers[:, 1], a["state"])


def test_deterministic_whatever_the_thread_count():
    a = make(8, None, 700, 16)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mine = a | {"state": a["state"].clone()}
        runs.append((rom.ops.selective_state_update(**mine), mine["state"]))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


def test_extremes(device):
    a = make(2, None, 20, 16, device=device)
    a["delta"] = torch.tensor([1e-20, 200.0], device=device).repeat(10).expand(2, 20)
    a["A"] = torch.cat([a["A"][:, :8] * 100, a["A"][:, 8:] * 1e-6], 1)
    compare(a)


def test_autocast_casts_activations_only():
    a = make(2, None, 20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rom.ops.selective_state_update(**a)
    assert out.dtype == torch.bfloat16 and a["state"].dtype == torch.float32


def test_gradients_are_refused():
    a = make(2, None, 20, 16)
    a["A"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"A requires one.*no_grad.*selective_scan with initial_state"):
        rom.ops.selective_state_update(**a)
    with torch.no_grad():
        rom.ops.selective_state_update(**a)


def test_opcheck_and_compile():
    a = make(2, 3, 20, 16)
    slots = torch.tensor([1, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.rom.selective_state_update.default, (*a.values(), slots, "cpu"))
    other = a | {"state": a["state"].clone()}
    expected = rom.ops.selective_state_update(**a)
    got = torch.compile(rom.ops.selective_state_update, fullgraph=True)(**other)
    assert torch.equal(got, expected) and torch.equal(a["state"], other["state"])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"u": torch.ones(8)}, ValueError, r"u of shape \[batch, dim\]"),
        ({"delta": torch.ones(2, 7)}, ValueError, r"delta of shape \(2, 8\), got \(2, 7\)"),
        ({"delta": torch.ones(2, 8).half()}, TypeError, "delta of dtype torch.float32 like u"),
        ({"state": torch.ones(2, 8, 4).half()}, TypeError, "state of dtype torch.float32, got torch.float16"),
        ({"state": torch.ones(2, 8, 5)}, ValueError, r"state of shape \(slots, 8, 4\)"),
        ({"state": torch.ones(3, 8, 4)}, ValueError, "state with 2 slots"),
        ({"state": torch.ones(2, 4, 8).transpose(1, 2)}, ValueError, "stride 1 in its last dimension"),
        ({"A": torch.ones(7, 4)}, ValueError, r"A of shape \(8, state\)"),
        ({"A": torch.ones(8, 4, dtype=torch.complex64)}, TypeError, "A of dtype float32"),
        ({"B": torch.ones(2, 5)}, ValueError, r"B of shape"),
        ({"B": torch.ones(2, 3, 4)}, ValueError, "number of groups in B that divides dim 8, got 3"),
        ({"D": torch.ones(7)}, ValueError, r"D of shape \(8,\)"),
        ({"z": torch.ones(2, 8, device="meta")}, ValueError, "z on cpu like u, got meta"),
        ({"u": 1.0}, TypeError, "u to be a tensor, got float"),
        ({"state_indices": torch.tensor([0, 1])}, TypeError, "state_indices of dtype torch.int32"),
        ({"state_indices": torch.tensor([1, 1], dtype=torch.int32)}, ValueError, "every slot at most once"),
        ({"state_indices": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "state_indices below 2"),
    ],
)
def test_errors(change, error, message):
    u, one = torch.ones(2, 8), torch.ones(2, 4)
    arguments = {"state": torch.ones(2, 8, 4), "u": u, "delta": u, "A": -torch.ones(8, 4), "B": one, "C": one} | change
    with pytest.raises(error, match=message):
        rom.ops.selective_state_update(**arguments)


def test_docstring_example(run_doctests):
    run_doctests(state_update)
