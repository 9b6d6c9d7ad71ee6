"""rom.compat.causal_conv1d: the original's arguments and layouts."""

import pytest
import torch
import torch.nn.functional as F
from compat_cases import conv
from tolerance import assert_close

from rom.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

BATCH, DIM, LENGTH = 2, 5, 9


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_forward_and_states(width, channels_last):
    x, before = torch.randn(BATCH, DIM, LENGTH), torch.randn(BATCH, DIM, width - 1)
    x = x.mT.contiguous().mT if channels_last else x
    weight, bias = torch.randn(DIM, width), torch.randn(DIM)
    out, final = causal_conv1d_fn(x, weight, bias, None, before, return_final_states=True, activation="silu")
    expected = F.silu(conv(x.double(), weight.double(), bias.double(), before.double()))
    assert_close("out", out, expected)
    assert torch.equal(final, torch.cat([before, x], 2)[..., 1 - width :])
    place = torch.empty_like(final)
    out = causal_conv1d_fn(x, weight, bias, initial_states=before, final_states_out=place)
    assert isinstance(out, torch.Tensor) and torch.equal(place, final)


def test_gradients():
    tensors = [torch.randn(BATCH, DIM, LENGTH), torch.randn(DIM, 4), torch.randn(DIM), torch.randn(BATCH, DIM, 3)]
    double = [t.double().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    x, weight, bias, before = tensors
    out = causal_conv1d_fn(x, weight, bias, initial_states=before)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(conv(*double[:3], double[3]), double, grad.double())
    for name, g, e in zip(("x", "weight", "bias", "initial_states"), torch.autograd.grad(out, tensors, grad), expected):
        assert_close(f"{name}.grad", g, e)


def test_sequences_in_a_row():
    x, weight = torch.randn(BATCH, DIM, LENGTH), torch.randn(DIM, 4)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, -1, -1]])
    out = causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    for b, spans in ((0, ((0, 3), (3, 5), (5, 9))), (1, ((0, 7),))):
        for begin, end in spans:
            alone = causal_conv1d_fn(x[b : b + 1, :, begin:end], weight)
            assert_close("alone", out[b : b + 1, :, begin:end], alone.double())
    assert not out[1, :, 7:].any()
    with pytest.raises(ValueError, match="without initial and final states"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx, return_final_states=True)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("places", [3, 4, 6])
@pytest.mark.parametrize("ring", [False, True])
def test_update_continues(places, steps, ring):
    """A state of any size, shifted or as a ring, equals the convolution of the whole sequence."""
    weight, bias, x = torch.randn(DIM, 4), torch.randn(DIM), torch.randn(BATCH, DIM, LENGTH)
    state = torch.zeros(BATCH, DIM, places)
    outs, seen, stride = [], 0, max(steps, 1)
    for begin in range(0, LENGTH, stride):
        part = x[..., begin] if steps == 0 else x[..., begin : begin + stride]
        cache = torch.full((BATCH,), seen, dtype=torch.int32) if ring else None
        out = causal_conv1d_update(part, state, weight, bias, "silu", cache)
        assert out.shape == part.shape
        outs.append(out.unsqueeze(-1) if steps == 0 else out)
        seen += stride
    expected = F.silu(conv(x.double(), weight.double(), bias.double()))
    assert_close("out", torch.cat(outs, -1), expected)


@pytest.mark.parametrize("places", [4, 5])
def test_slots(places):
    weight, x, states = torch.randn(DIM, 4), torch.randn(3, DIM), torch.randn(6, DIM, places)
    before = states.clone()
    out = causal_conv1d_update(x, states, weight, conv_state_indices=torch.tensor([4, -1, 0]))
    alone = before[[4, 0]].clone()
    expected = causal_conv1d_update(x[[0, 2]], alone, weight)
    assert torch.equal(out[[0, 2]], expected) and not out[1].any()
    assert torch.equal(states[[4, 0]], alone) and torch.equal(states[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


def test_a_state_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 3 places, got 2"):
        causal_conv1d_update(torch.randn(1, DIM), torch.zeros(1, DIM, 2), torch.randn(DIM, 4))
