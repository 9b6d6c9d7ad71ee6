"""The scan's Triton kernels on a GPU, where `auto` would choose CUDA: whole blocks, prefetched rows, many sequences."""

import pytest
import torch
from ops import test_state_update as decode
from scan_cases import compare, make, outputs_and_gradients

import rom

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]


@pytest.fixture(autouse=True)
def on_triton():
    with rom.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bare": True},
        {"groups": 3, "rows": 2},
        {"constant": "B"},
        {"constant": "BC"},
        {"cu_seqlens": [0, 0, 5, 38, 38, 67]},
        {"cu_seqlens": [0, 64, 67], "rows": 2, "groups": 3},
    ],
    ids=str,
)
def test_matches_float64(case, dtype):
    compare((1 if "cu_seqlens" in case else 2, 67, 39), 5, dtype, "cuda", **case)


@pytest.mark.parametrize("state", [1, 8, 16, 32, 64, 128, 256])
def test_state_counts(state):
    compare((2, 70, 144), state, torch.float32, "cuda")


def test_same_bits_again():
    bounds = [0, *sorted(torch.randint(0, 3000, (300,)).tolist()), 3000]
    arguments, options = make((1, 3000, 512), 16, torch.bfloat16, "cuda", cu_seqlens=bounds)
    first, again = (outputs_and_gradients(rom.ops.selective_scan, arguments, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("states", [16, 37, 256])
def test_state_update(states):
    decode.compare(decode.make(5, 3, 250, states, torch.bfloat16, device="cuda"))
