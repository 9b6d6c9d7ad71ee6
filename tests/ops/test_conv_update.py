import pytest
import torch
from tolerance import assert_close

import rom
from rom.ops import conv_update
from rom.reference import conv as reference

# (x, conv_state): caches come in the model's dtype or in float32
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def make(batch, steps, dim, width, dtype=torch.float32, state_dtype=None, slots=None, device="cpu"):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*((batch, dim) if steps is None else (batch, steps, dim))).to(dtype)
    state = torch.randn(slots or batch, dim, width).to(state_dtype or compute)
    parameters = torch.randn(dim, width, dtype=compute), torch.randn(dim, dtype=compute)
    return tuple(t.to(device) for t in (x, state, *parameters))


def compare(x, state, weight, bias):
    expected_state, plain_state = state.double().clone(), state.clone()
    expected = reference.causal_conv1d_update(x.double(), expected_state, weight, bias, "silu")
    plain = reference.causal_conv1d_update(x, plain_state, weight, bias, "silu")
    got = rom.ops.causal_conv1d_update(x, state, weight, bias, "silu")
    assert got.dtype == x.dtype and got.shape == x.shape
    assert_close("out", got, expected, plain)
    assert torch.equal(state.double(), expected_state)


@pytest.mark.parametrize("steps", [None, 1, 5])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))
def test_matches_float64(dtypes, width, steps, device):
    compare(*make(3, steps, 45, width, *dtypes, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, None, 1536, 4), (3, 4, 250, 3), (2, 3, 77, 2), (5000, None, 8, 4)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))
def test_cuda_kernel(dtypes, shape):
    """Several sequences per thread; weight and bias are read in either dtype, uncast; a rerun gives the same bits."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    x, state, weight, bias = make(*shape, *dtypes, device="cuda")
    with rom.backend("cuda"):
        for parameters in ((weight, bias), (weight.to(x.dtype), bias), (weight.to(x.dtype), bias.to(x.dtype))):
            states = [state.clone() for _ in range(3)]
            runs = [rom.ops.causal_conv1d_update(x, mine, *parameters, "silu") for mine in states[:2]]
            assert torch.equal(*runs) and torch.equal(*states[:2])
            compare(x, states[2], *parameters)


@pytest.mark.gpu
def test_cuda_graph_follows_the_indices():
    """The host never reads the indices: a captured step runs on whatever slots they name at replay."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    x, state, weight, bias = make(3, None, 200, 4, torch.bfloat16, slots=6, device="cuda")
    before = state.clone()
    indices = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    with rom.backend("cuda"), torch.no_grad():
        rom.ops.causal_conv1d_update(x, state, weight, bias, "silu", indices)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rom.ops.causal_conv1d_update(x, state, weight, bias, "silu", indices)
        for names in ([4, -1, 0], [1, 2, 6]):
            state.copy_(before)
            indices.copy_(torch.tensor(names))
            graph.replay()
            valid = [row for row, slot in enumerate(names) if 0 <= slot < 6]
            slots = [names[row] for row in valid]
            alone = before[slots].clone()
            assert torch.equal(out[valid], rom.ops.causal_conv1d_update(x[valid], alone, weight, bias, "silu"))
            assert torch.equal(state[slots], alone)
            others = [slot for slot in range(6) if slot not in slots]
            assert torch.equal(state[others], before[others])
            if -1 in names:
                assert not out[names.index(-1)].any()
            if 6 in names:
                assert out[names.index(6)].isnan().all()


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_forward(dtype, chunk, device):
    x, state, weight, bias = make(2, 9, 600, 4, dtype, device=device)
    whole, final = rom.ops.causal_conv1d(x, weight, bias, "silu", state, return_final_state=True)
    outs = [rom.ops.causal_conv1d_update(part, state, weight, bias, "silu") for part in x.split(chunk, 1)]
    assert_close("out", torch.cat(outs, 1), whole.double())
    assert torch.equal(state, final)


def test_state_indices(device):
    x, state, weight, bias = make(4, 2, 20, 4, slots=7, device=device)
    before = state.clone()
    slots = torch.tensor([5, -1, 0, -1], dtype=torch.int32, device=device)
    out = rom.ops.causal_conv1d_update(x, state, weight, bias, None, slots)
    assert not out[1].any() and not out[3].any()
    for row, slot in ((0, 5), (2, 0)):
        alone = before[slot : slot + 1].clone()
        assert torch.equal(out[row], rom.ops.causal_conv1d_update(x[row : row + 1], alone, weight, bias)[0])
        assert torch.equal(state[slot], alone[0])
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(state[untouched], before[untouched])


def test_strided_state_and_input(device):
    x, state, weight, bias = make(3, 2, 20, 4, device=device)
    transposed = state.transpose(1, 2).contiguous().transpose(1, 2)  # channels contiguous, as causal_conv1d keeps it
    inputs = torch.cat([x, x], -1)[..., :20]
    got = rom.ops.causal_conv1d_update(inputs, transposed, weight, bias, "silu")
    assert torch.equal(got, rom.ops.causal_conv1d_update(x, state, weight, bias, "silu"))
    assert torch.equal(transposed, state)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(shape, device):
    x, state, weight, bias = make(*shape, 4, device=device)
    before = state.clone()
    assert rom.ops.causal_conv1d_update(x, state, weight, bias).shape == shape
    assert torch.equal(state, before)


def test_other_widths_need_the_reference():
    x, state, weight, bias = make(2, 3, 8, 5)
    with pytest.raises(rom.BackendError, match="width 5 is not one of"), rom.backend("strict"):
        rom.ops.causal_conv1d_update(x, state, weight, bias)
    whole = reference.causal_conv1d(x, weight, bias, initial_state=state)
    with rom.backend("reference"):
        assert torch.equal(rom.ops.causal_conv1d_update(x, state, weight, bias), whole)


def test_autocast_casts_x_only():
    x, state, weight, bias = make(2, 3, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rom.ops.causal_conv1d_update(x, state, weight, bias).dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_gradients_are_refused():
    x, state, weight, bias = make(2, 3, 8, 4)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match=r"weight requires one.*torch.no_grad\(\).*causal_conv1d with initial_state"):
        rom.ops.causal_conv1d_update(x, state, weight, bias)
    with torch.no_grad():
        rom.ops.causal_conv1d_update(x, state, weight, bias)


def test_opcheck_and_compile():
    x, state, weight, bias = make(2, 3, 8, 4)
    slots = torch.tensor([1, 0], dtype=torch.int32)
    operator = torch.ops.rom.causal_conv1d_update.default
    torch.library.opcheck(operator, (x, state, weight, bias, True, slots, "cpu"))
    other = state.clone()
    expected = rom.ops.causal_conv1d_update(x, state, weight, bias, "silu")
    compiled = torch.compile(rom.ops.causal_conv1d_update, fullgraph=True)
    assert_close("out", compiled(x, other, weight, bias, "silu"), expected.double())
    assert torch.equal(other, state)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(8)}, ValueError, r"x of shape \[batch, dim\] or \[batch, steps, dim\], got \(8,\)"),
        ({"conv_state": torch.ones(2, 8, 3)}, ValueError, r"conv_state of shape \(slots, 8, 4\), got \(2, 8, 3\)"),
        (
            {"conv_state": torch.ones(3, 8, 4)},
            ValueError,
            "conv_state with 2 slots, one per sequence, got 3.*state_ind",
        ),
        ({"conv_state": torch.ones(2, 8, 4).half()}, TypeError, "conv_state of dtype torch.float32"),
        ({"weight": torch.ones(8, 1, 4)}, ValueError, r"weight of shape \(8, width\)"),
        ({"activation": "relu"}, ValueError, "activation None"),
        ({"state_indices": torch.tensor([0, 1])}, TypeError, "state_indices of dtype torch.int32, got torch.int64"),
        ({"state_indices": torch.tensor([0], dtype=torch.int32)}, ValueError, r"state_indices of shape \(2,\)"),
        ({"state_indices": torch.tensor([0, 0], dtype=torch.int32)}, ValueError, "every slot at most once"),
        ({"state_indices": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "state_indices below 2.*got 2"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(2, 8), "conv_state": torch.ones(2, 8, 4), "weight": torch.ones(8, 4)} | change
    with pytest.raises(error, match=message):
        rom.ops.causal_conv1d_update(**arguments)


def test_docstring_example(run_doctests):
    run_doctests(conv_update)
