"""selective_scan's Triton kernels: every option, value and gradient against float64. Shapes are small: a step of the
interpreter takes milliseconds. 33 steps are two tiles of checkpoints; 40 channels of few states are two blocks."""

import pytest
import torch
from rom.triton_kernels import scan
from scan_cases import compare, make, outputs_and_gradients

import rom

f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def on_triton():
    with rom.backend("triton"):
        yield


CASES = [
    ({}, f32, (1, 33, 5)),
    ({"bare": True}, f16, (2, 3, 40)),
    ({"groups": 3, "rows": 2}, f64, (1, 5, 6)),
    ({"rows": 1, "out_dtype": f32}, f16, (2, 3, 5)),
    ({"rows": 3}, bf16, (1, 5, 4)),
    ({"constant": "B", "groups": 2}, f32, (2, 3, 6)),
    ({"constant": "C"}, bf16, (2, 3, 40)),
    ({"constant": "BC"}, f64, (2, 3, 5)),
    ({"cu_seqlens": [0, 0, 1, 34, 34, 35]}, f64, (1, 35, 5)),
    ({"cu_seqlens": [0, 2, 5], "rows": 2, "groups": 2, "constant": "C"}, f32, (1, 5, 4)),
]


def scale(dtype):
    """The interpreter narrows to bfloat16 by truncation, twice the error of rounding."""
    return 2.0 if dtype == bf16 else 1.0


@pytest.mark.parametrize("case, dtype, shape", CASES, ids=str)
def test_matches_float64(case, dtype, shape):
    compare(shape, 5, dtype, scale=scale(dtype), **case)


@pytest.mark.slow
@pytest.mark.parametrize("case, _, shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [f32, f16, bf16, f64], ids=str)
def test_matches_float64_in_every_dtype(case, dtype, _, shape):
    if dtype == f64:
        case = case | {"out_dtype": None}
    compare(shape, 5, dtype, scale=scale(dtype), **case)


@pytest.mark.parametrize("state", [1, 16, 37, 256])
def test_state_counts(state):
    compare((1, 3, 18), state, f32)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 31, 32, 64, 129])
def test_lengths(length):
    compare((1, length, 5), 3, f32, scale=10.0 if length < 3 else 1.0)  # gradients of few terms may cancel


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("constant", ["", "BC"])
def test_empty(shape, constant):
    arguments, options = make(shape, 3, f32, constant=constant)
    out, state, *gradients = outputs_and_gradients(rom.ops.selective_scan, arguments, options)
    assert out.shape == shape and state.shape == (shape[0], shape[2], 3)
    if shape[1] == 0:
        torch.testing.assert_close(state, arguments["initial_state"])
    by_name = dict(zip(arguments, gradients))
    assert all(not by_name[name].any() for name in ("A", "B", "C", "D", "delta_bias"))


def test_segments_of_several_sequences(monkeypatch):
    monkeypatch.setattr(scan, "MAX_PROGRAMS", 2)
    compare((1, 7, 5), 3, f64, cu_seqlens=[0, 2, 2, 3, 5, 7])
    compare((3, 2, 5), 3, f64, constant="BC")


@pytest.mark.parametrize("extreme", ["large_delta", "decayed", "tiny_delta", "saturated_gate"])
def test_extremes(extreme):
    change = {
        "large_delta": {"delta": lambda x: x + 25},
        "decayed": {"A": lambda x: x * 1000 - 100},
        "tiny_delta": {"delta": lambda x: x - 20},
        "saturated_gate": {"z": lambda x: x * 1e4},
    }[extreme]
    compare((1, 6, 5), 4, f32, change=change)


def test_strides_and_reruns():
    batch, length, dim, state = 2, 3, 6, 5
    u, z = torch.randn(batch, length, 2 * dim).chunk(2, dim=-1)
    delta, B, C = torch.randn(batch, length, dim + 2 * state).split([dim, state, state], dim=-1)
    u = u.transpose(0, 1).contiguous().transpose(0, 1)
    views = {"u": u, "delta": delta, "A": -torch.rand(dim, state), "B": B, "C": C, "z": z}
    got = outputs_and_gradients(rom.ops.selective_scan, views, {"delta_softplus": True})
    copies = {k: v.contiguous() for k, v in views.items()}
    again = outputs_and_gradients(rom.ops.selective_scan, copies, {"delta_softplus": True})
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_packed_equals_separate_and_batched():
    arguments, options = make((2, 9, 5), 3, f32)
    lead = ("u", "delta", "B", "C", "z")
    packed = {k: v.reshape(1, 18, *v.shape[2:]) if k in lead else v for k, v in arguments.items()}
    grads = [torch.randn(2, 9, 5), torch.randn(2, 5, 3)]
    batched = outputs_and_gradients(rom.ops.selective_scan, arguments, options, grads)
    options["cu_seqlens"] = torch.tensor([0, 9, 18], dtype=torch.int32)
    grads[0] = grads[0].reshape(1, 18, 5)
    for a, b in zip(batched, outputs_and_gradients(rom.ops.selective_scan, packed, options, grads)):
        assert torch.equal(a, b.reshape(a.shape))


def test_opcheck():
    tensors, options = make((1, 2, 4), 2, f32, rows=2)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arguments = (*(tensors[n].requires_grad_() for n in names), True, tensors["initial_state"], None)
    arguments += (options["row_index"], f32, True, "triton")
    torch.library.opcheck(torch.ops.rom.selective_scan.default, arguments)


def test_is_listed():
    rows = [r for r in rom.backends() if r.op in ("selective_scan", "selective_state_update") and r.backend == "triton"]
    assert len(rows) == 2 and all(r.available for r in rows)
