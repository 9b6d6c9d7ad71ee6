"""selective_scan against the float64 reference: every option, dtype, layout and gradient."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import ACTIVATIONS, compare, make, outputs_and_gradients
from tolerance import FLOOR, assert_close, errors

import rom
from rom.reference import scan as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bare": True},
        {"groups": 3},
        {"constant": "B"},
        {"constant": "C", "groups": 3},
        {"constant": "BC"},
        {"rows": 1},
        {"rows": 2},
        {"cu_seqlens": [0, 0, 5, 38, 38, 67]},
        {"cu_seqlens": [0, 64, 67], "rows": 2, "groups": 3},
    ],
    ids=str,
)
def test_matches_float64(case, dtype, device):
    compare((1 if "cu_seqlens" in case else 2, 67, 39), 5, dtype, device, **case)


@settings(max_examples=25)
@given(
    length=st.integers(1, 100),
    dim=st.integers(1, 60),
    state=st.integers(1, 20),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape(length, dim, state, batch, seed):
    torch.manual_seed(seed)
    # A gradient of very few elements may cancel: terms of size 1 that sum to 0.1 lose a digit.
    compare((batch, length, dim), state, torch.float32, scale=1.0 if dim * length > 200 else 10.0)


@pytest.mark.parametrize("length", [1, 7, 129, 2049])
def test_lengths(length, device):
    compare((1, length, 20), 16, torch.float32, device)


@pytest.mark.parametrize("state", [1, 3, 64, 256])
def test_state_counts(state, device):
    compare((1, 40, 18), state, torch.float32, device)


@pytest.mark.slow
def test_long_sequence(device):
    arguments, options = make((1, 65536, 17), 16, torch.float32, device)
    got = rom.ops.selective_scan(**arguments, **options)
    expected = reference.selective_scan(**{k: v.double() for k, v in arguments.items()}, **options)
    for name, g, e in zip(("out", "final_state"), got, expected):
        assert_close(name, g, e)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("constant", ["", "BC"])
def test_empty(shape, constant, device):
    arguments, options = make(shape, 3, torch.float32, device, constant=constant)
    out, state, *gradients = outputs_and_gradients(rom.ops.selective_scan, arguments, options)
    assert out.shape == shape and state.shape == (shape[0], shape[2], 3)
    if shape[1] == 0:
        torch.testing.assert_close(state, arguments["initial_state"])
    by_name = dict(zip(arguments, gradients))
    assert all(not by_name[name].any() for name in ("A", "B", "C", "D", "delta_bias"))


def test_gradcheck_runs_the_native_kernel():
    for case in ({}, {"constant": "BC"}, {"rows": 2, "groups": 2}, {"cu_seqlens": [0, 2, 2, 6]}):
        arguments, options = make((1, 6, 4), 3, torch.float64, **case)
        names = list(arguments)
        values = tuple(v.requires_grad_() for v in arguments.values())
        with rom.backend("cpu"):
            assert torch.autograd.gradcheck(
                lambda *v, n=names, o=options: rom.ops.selective_scan(**dict(zip(n, v)), **o), values
            )


def test_strides_are_free(device):
    # Chunks of a projection's output and slices of x_dbl, in both directions, without a copy changing anything.
    batch, length, dim, state = 2, 37, 24, 5
    u_z = torch.randn(batch, length, 2 * dim, device=device)
    delta_B_C = torch.randn(batch, length, dim + 2 * state, device=device)
    delta, B, C = delta_B_C.split([dim, state, state], dim=-1)
    u, z = u_z.chunk(2, dim=-1)
    A = -torch.rand(dim, state, device=device)
    time_major = torch.randn(length, batch, dim, device=device).transpose(0, 1)
    views = {"u": u, "delta": delta, "A": A.t().contiguous().t(), "B": B, "C": C, "z": z}
    for case in (views, views | {"u": time_major}, views | {"u": time_major[..., ::2].repeat(1, 1, 2)}):
        got = outputs_and_gradients(rom.ops.selective_scan, case, {"delta_softplus": True})
        copies = {k: v.contiguous() for k, v in case.items()}
        expected = outputs_and_gradients(rom.ops.selective_scan, copies, {"delta_softplus": True})
        assert all(torch.equal(g, e) for g, e in zip(got, expected))


def test_out_dtype(device):
    arguments, options = make((2, 40, 20), 4, torch.bfloat16, device)
    out, _ = rom.ops.selective_scan(**arguments, **options, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    expected, _ = reference.selective_scan(**{k: v.double() for k, v in arguments.items()}, **options)
    assert_close("out", out, expected)
    compare((2, 40, 20), 4, torch.float16, device, rows=2, out_dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ identities
def test_split_equals_whole(device):
    arguments, options = make((2, 90, 20), 4, torch.float32, device)
    whole, final_state = rom.ops.selective_scan(**arguments, **options)
    parts, state = [], arguments["initial_state"]
    for begin, end in ((0, 1), (1, 32), (32, 64), (64, 64), (64, 90)):
        part = {k: v[:, begin:end] if k in ACTIVATIONS else v for k, v in arguments.items()}
        out, state = rom.ops.selective_scan(**part | {"initial_state": state}, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6 * whole.abs().max())
    torch.testing.assert_close(state, final_state, rtol=0, atol=1e-6 * state.abs().max())


def test_packed_equals_separate(device):
    bounds = [0, 31, 31, 96, 97, 130]
    arguments, options = make((1, 130, 33), 4, torch.float32, device, cu_seqlens=bounds)
    packed, states = rom.ops.selective_scan(**arguments, **options)
    del options["cu_seqlens"]
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = {k: v[:, begin:end] if k in ACTIVATIONS else v for k, v in arguments.items()}
        part["initial_state"] = arguments["initial_state"][i : i + 1]
        out, state = rom.ops.selective_scan(**part, **options)
        assert torch.equal(out, packed[:, begin:end]) and torch.equal(state[0], states[i])


@pytest.mark.parametrize("k", [1, 2])
def test_row_index_equals_gather_and_scatter(k, device):
    arguments, options = make((2, 40, 20), 4, torch.float32, device, rows=k)
    got, _ = rom.ops.selective_scan(**arguments, **options)
    rows = options.pop("row_index").long().view(80, k)
    gathered = arguments["z"][rows[:, 0]] if k == 1 else arguments["z"][rows[:, 0]] + arguments["z"][rows[:, 1]]
    out, _ = rom.ops.selective_scan(**arguments | {"z": gathered.view(2, 40, 20)}, **options)
    for i in range(k):
        assert torch.equal(got[rows[:, i]], out.view(80, 20))


# ------------------------------------------------------------------------------------------------ numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", ["large_delta", "decayed", "tiny_delta", "saturated_gate"])
def test_extremes(extreme, dtype, device):
    arguments, options = make((2, 70, 20), 4, dtype, device)
    if extreme == "large_delta":  # beyond softplus' threshold: delta is the identity, every step forgets
        arguments["delta"] = arguments["delta"] + 25
    elif extreme == "decayed":  # exp(delta A) below the smallest normal number
        arguments["A"] = arguments["A"] * 1000 - 100
    elif extreme == "tiny_delta":  # softplus ~ 1e-9, where log(1 + e) would be 0
        arguments["delta"] = arguments["delta"] - 20
    else:
        arguments["z"] = arguments["z"] * 1e4
    expected, plain, got = (
        outputs_and_gradients(f, {k: v.to(cast) for k, v in arguments.items()}, options)
        for f, cast in (
            (reference.selective_scan, torch.float64),
            (reference.selective_scan, dtype),
            (rom.ops.selective_scan, dtype),
        )
    )
    for name, g, e, p in zip(("out", "final_state", *arguments), got, expected, plain):
        assert_close(name, g, e, p)


def test_no_drift_where_decays_are_near_one(device):
    # a = exp(-1e-4): an exponential that is wrong by 2e-7 on average would add up to 2e-3 here.
    length, dim = 4096, 16
    u = torch.ones(1, length, dim, device=device)
    delta, A = torch.full_like(u, 1e-3), -torch.linspace(0.05, 0.3, dim, device=device)[:, None]
    B = torch.ones(1, length, 1, device=device)
    got = rom.ops.selective_scan(u, delta, A, B, B)
    plain = reference.selective_scan(u, delta, A, B, B)
    expected = reference.selective_scan(*(t.double() for t in (u, delta, A, B, B)))
    assert_close("out", got, expected, plain)  # `a` itself rounds to 24 bits: plain torch drifts by 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_at_most_twice_what_plain_torch_does(dtype, device):
    arguments, options = make((2, 200, 40), 16, dtype, device)
    got, _ = rom.ops.selective_scan(**arguments, **options)
    expected, _ = reference.selective_scan(**{k: v.double() for k, v in arguments.items()}, **options)
    plain, _ = reference.selective_scan(**arguments, **options)
    assert errors(got, expected)[0] <= 2 * errors(plain, expected)[0]


@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grid_and_tolerances_of_mamba_ssm(dtype, groups, length, device):
    """The published grid of mamba_ssm's tests/ops/test_selective_scan.py, with the dtypes it leaves out."""
    if length > 1024 and dtype != torch.float32:
        pytest.skip("its own grid is float32 only")
    rtol, atol = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}[dtype]
    arguments, options = make((2, length, 4), 8, dtype, device, groups=groups)
    out, state = rom.ops.selective_scan(**arguments, **options)
    expected, expected_state = reference.selective_scan(**arguments, **options)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(state, expected_state, rtol=rtol, atol=atol)


def test_deterministic_whatever_the_thread_count(device):
    for case in ({}, {"constant": "BC"}, {"cu_seqlens": [0, 3, 3, 50, 100]}):
        arguments, options = make((1 if case.get("cu_seqlens") else 3, 100, 300), 4, torch.float32, device, **case)
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            runs.append(outputs_and_gradients(rom.ops.selective_scan, arguments, options))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.gpu
@pytest.mark.parametrize("state", [8, 16, 32, 128])
@pytest.mark.parametrize("dim", [2048, 4096])
def test_many_channels(dim, state):
    """So many that the CUDA kernels take one or two lanes per channel instead of four."""
    compare((16, 70, dim), state, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_cuda_graph():
    arguments, options = make((1, 100, 96), 16, torch.bfloat16, "cuda", cu_seqlens=[0, 40, 40, 100])
    expected = rom.ops.selective_scan(**arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rom.ops.selective_scan(**arguments, **options)
    graph.replay()
    assert all(torch.equal(c, e) for c, e in zip(captured, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [{}, {"groups": 3, "rows": 2}, {"constant": "C"}], ids=str)
def test_cuda_graph_of_gradients(case):
    arguments, options = make((1, 100, 96), 20, torch.bfloat16, "cuda", cu_seqlens=[0, 40, 40, 100], **case)
    grads = [torch.randn_like(o) for o in rom.ops.selective_scan(**arguments, **options)]
    expected = outputs_and_gradients(rom.ops.selective_scan, arguments, options, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(rom.ops.selective_scan, arguments, options, grads)
    graph.replay()
    assert all(torch.equal(c, e) for c, e in zip(captured, expected))


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Each set in its own process: the choice is made once."""
    code = (
        "import torch, scan_cases\n"
        "torch.manual_seed(0)\n"
        "for case in ({}, {'groups': 3, 'rows': 2}, {'constant': 'B'}):\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "        scan_cases.compare((2, 45, 39), 6, dtype, **case)\n"
    )
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the clone's root has an unbuilt rom/
    environment = {**os.environ, "ROM_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tests, env=environment, timeout=120)


def test_floor_holds_the_published_accuracy(device):
    """Relative to float64, float32 outputs of a trained-like layer stay within 2e-6."""
    arguments, options = make((1, 512, 96), 16, torch.float32, device)
    got, _ = rom.ops.selective_scan(**arguments, **options)
    expected, _ = reference.selective_scan(**{k: v.double() for k, v in arguments.items()}, **options)
    assert errors(got, expected)[1] <= 2e-6 < FLOOR[torch.float32]
