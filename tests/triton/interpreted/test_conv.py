import pytest
import torch
from conv_cases import compare, make, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.reference import conv as reference

f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Sequences of one step, shorter than the width, empty at both ends and between, across and up to the end of 16 steps.
PACKED = {"cu_seqlens": [0, 0, 1, 3, 3, 16, 16, 18, 33, 33]}


@pytest.fixture(autouse=True)
def on_triton():
    with rom.backend("triton"):
        yield


@pytest.mark.parametrize(
    "shape, width, dtype, activation, kinds",
    [
        ((2, 18, 21), 4, f32, "silu", {}),  # the second run has fewer steps than the width
        ((1, 33, 5), 4, f32, "silu", PACKED),
        ((1, 33, 5), 3, bf16, "silu", PACKED | {"rows_per_step": 2, "initial": False}),
        ((2, 17, 9), 2, f16, None, {"rows_per_step": 1, "bias": False}),
        ((1, 17, 6), 3, f64, "silu", {"initial": False}),
        ((1, 2, 300), 4, f32, None, {}),  # shorter than the width; three blocks of channels
        pytest.param((1, 33, 5), 2, f32, None, PACKED, marks=pytest.mark.slow),
        pytest.param((2, 33, 256), 4, f16, "silu", {"rows_per_step": 3}, marks=pytest.mark.slow),
    ],
)
def test_matches_float64(shape, width, dtype, activation, kinds):
    compare(make(*shape, width, dtype, **kinds), activation)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6) | st.integers(14, 18), min_size=1, max_size=5),
    width=st.integers(2, 4),
    rows_per_step=st.integers(0, 2),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_packing(lengths, width, rows_per_step, initial, seed):
    torch.manual_seed(seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    kinds = {"cu_seqlens": bounds, "rows_per_step": rows_per_step, "initial": initial}
    compare(make(1, bounds[-1], 3, width, f32, **kinds), "silu")


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_empty(shape):
    a = make(*shape, 4, f32)
    out, final = rom.ops.causal_conv1d(**a, return_final_state=True)
    assert out.shape == shape and final.shape == (shape[0], shape[2], 4)
    (out.sum() + final.sum()).backward()
    assert not a["weight"].grad.any() and not a["bias"].grad.any()
    if shape[1] == 0:
        assert torch.equal(final, a["initial_state"]) and (a["initial_state"].grad == 1).all()


def test_strides_and_rerun():
    """Views with any strides of batch and time are read in place, gradients likewise; runs are equal bit by bit."""
    a = make(2, 10, 8, 4, f32)
    view = torch.randn(10, 2, 16, requires_grad=True).transpose(0, 1)[..., 8:]
    grads = torch.randn(2, 20, 8)[:, ::2], torch.randn(2, 8, 4)
    runs = [
        outputs_and_gradients(rom.ops.causal_conv1d, a | {"x": x}, "silu", grads)
        for x in (view, view, view.detach().contiguous().requires_grad_())
    ]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


def test_other_widths_are_refused():
    with pytest.raises(rom.BackendError, match="width 5 is not one of"):
        rom.ops.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 5))
    with pytest.raises(rom.BackendError, match="width 1 is not one of"):
        rom.ops.causal_conv1d_update(torch.ones(1, 2), torch.ones(1, 2, 1), torch.ones(2, 1))


@pytest.mark.parametrize("steps, width", [(None, 4), (1, 3), (2, 2), (6, 4)])
@pytest.mark.parametrize("dtype, state_dtype", [(f32, f32), (f16, f16), (bf16, f32), (f64, f64)])
def test_update(dtype, state_dtype, steps, width):
    """In slots of a larger state whose channels are contiguous, a padding row between them."""
    compute = f64 if dtype == f64 else f32
    x = torch.randn((3, 130) if steps is None else (3, steps, 130)).to(dtype)
    weight, bias = torch.randn(130, width, dtype=compute), torch.randn(130, dtype=compute)
    state = torch.randn(5, width, 130).to(state_dtype).transpose(1, 2)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    expected_state, plain_state = state.double().clone(), state.clone()
    expected = reference.causal_conv1d_update(x.double(), expected_state, weight, bias, "silu", slots)
    plain = reference.causal_conv1d_update(x, plain_state, weight, bias, "silu", slots)
    got = rom.ops.causal_conv1d_update(x, state, weight, bias, "silu", slots)
    assert got.dtype == dtype and not got[1].any()
    assert_close("out", got, expected, plain)
    assert torch.equal(state.double(), expected_state)


def test_update_continues_the_forward():
    a = make(2, 5, 20, 4, f32)
    state = a["initial_state"].detach().clone()
    with torch.no_grad():
        whole, final = rom.ops.causal_conv1d(**a, return_final_state=True)
        parts = [rom.ops.causal_conv1d_update(x, state, a["weight"], a["bias"]) for x in a["x"].split((1, 4), 1)]
    assert_close("out", torch.cat(parts, 1), whole.double())
    assert torch.equal(state, final)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty_update(shape):
    state = torch.randn(shape[0], shape[2], 4)
    before = state.clone()
    out = rom.ops.causal_conv1d_update(torch.randn(shape), state, torch.randn(shape[2], 4))
    assert out.shape == shape and torch.equal(state, before)
