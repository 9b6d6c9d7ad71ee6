import pytest
import torch
from ops.test_state_update import compare, make

import rom
from rom.ops import _decode

f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize("dtype", [f32, f16, bf16, f64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "case",
    [
        {"steps": None, "states": 16},
        {"steps": 3, "states": 5, "groups": 2},
        {"steps": 2, "states": 3, "constant": True},
        {"steps": 1, "states": 37, "optional": False},
    ],
    ids=str,
)
def test_matches_float64(case, dtype):
    with rom.backend("triton"):
        compare(make(2, dim=70, dtype=dtype, **case))


@pytest.mark.parametrize("batch, steps, dim", [(0, 1, 4), (2, 0, 4)])
def test_empty(batch, steps, dim):
    a = make(batch, steps, dim, 3)
    before = a["state"].clone()
    with rom.backend("triton"):
        assert rom.ops.selective_state_update(**a).shape == (batch, steps, dim)
    assert torch.equal(a["state"], before)


def test_state_indices_and_strided_state():
    a = make(4, 2, 20, 5, slots=7)
    layers = torch.randn(7, 2, 20, 5)
    layers[:, 1] = a.pop("state")
    state, before = layers[:, 1], layers.clone()
    slots = torch.tensor([5, -1, 0, -7], dtype=torch.int32)
    with rom.backend("triton"):
        out = rom.ops.selective_state_update(state, **a, state_indices=slots)
    expected_state = before[:, 1].clone()
    expected = rom.ops.selective_state_update(expected_state, **a, state_indices=slots)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state)
    assert not out[1].any() and not out[3].any()
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(state[untouched], before[untouched, 1]) and torch.equal(layers[:, 0], before[:, 0])


def test_what_a_gpu_passes_on(monkeypatch):
    """Parameters in u's dtype, uncast, and slots nobody has checked: one that does not exist gives NaN."""
    monkeypatch.setattr(_decode, "readable", lambda *tensors, activations: list(tensors))
    monkeypatch.setattr(_decode, "check_slot_values", lambda *_: None)
    a = make(3, 2, 20, 5, f16, slots=2)
    a |= {name: a[name].half() for name in ("D", "delta_bias")}
    before = a["state"].clone()
    with rom.backend("triton"):
        out = rom.ops.selective_state_update(**a, state_indices=torch.tensor([2, 1, -1], dtype=torch.int32))
    assert out[0].isnan().all() and not out[2].any() and torch.equal(a["state"][0], before[0])
    alone = {k: a[k][1:2] for k in ("u", "delta", "B", "C", "z")}
    with rom.backend("reference"):
        expected = rom.ops.selective_state_update(**(a | alone | {"state": before[1:]}))
    torch.testing.assert_close(out[1:2], expected, rtol=2e-3, atol=2e-3)
