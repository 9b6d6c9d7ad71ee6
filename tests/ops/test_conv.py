from itertools import pairwise

import pytest
import torch
from conv_cases import NAMES, compare, make, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.ops import conv
from rom.reference import conv as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_float64(dtype, width, activation, device):
    compare(make(2, 150, 37, width, dtype, device=device), activation)


def test_is_torchs_convolution():
    a = make(2, 50, 40, 4, torch.float32, initial=False)
    padded = torch.nn.functional.pad(a["x"].transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded.double(), a["weight"][:, None].double(), a["bias"].double(), groups=40)
    assert_close("out", rom.ops.causal_conv1d(a["x"], a["weight"], a["bias"]), expected.transpose(1, 2))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 300),
    dim=st.integers(1, 70),
    width=st.integers(2, 4),
    rows_per_step=st.integers(0, 3),
    bias=st.booleans(),
    initial=st.booleans(),
    activation=st.sampled_from([None, "silu", "swish"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(batch, length, dim, width, rows_per_step, bias, initial, activation, seed):
    torch.manual_seed(seed)
    kinds = {"bias": bias, "initial": initial, "rows_per_step": rows_per_step}
    compare(make(batch, length, dim, width, torch.float32, **kinds), activation)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9) | st.integers(100, 140), min_size=1, max_size=6),
    rows_per_step=st.integers(0, 2),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_packing(lengths, rows_per_step, initial, seed):
    torch.manual_seed(seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    kinds = {"cu_seqlens": bounds, "rows_per_step": rows_per_step, "initial": initial}
    compare(make(1, bounds[-1], 21, 4, torch.float32, **kinds), "silu")


@pytest.mark.parametrize("dim", [512, 600])
def test_several_channel_blocks(dim, device):
    compare(make(1, 140, dim, 4, torch.float32, device=device), "silu")


@pytest.mark.parametrize("rows_per_step", [0, 1, 2])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 3, 4, 130, 256, 290, 290]], ids=["", "packed"])
def test_packed_rows(cu_seqlens, rows_per_step, device):
    compare(
        make(1, 290, 256, 4, torch.bfloat16, device=device, cu_seqlens=cu_seqlens, rows_per_step=rows_per_step), "silu"
    )


def test_packed_equals_separate(device):
    lengths = [3, 0, 1, 130, 2, 64]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    a = make(1, bounds[-1], 33, 4, torch.float32, device=device, cu_seqlens=bounds)
    packed, states = rom.ops.causal_conv1d(**a, activation="silu", return_final_state=True)
    for i, (start, end) in enumerate(pairwise(bounds)):
        out, state = rom.ops.causal_conv1d(
            a["x"][:, start:end], a["weight"], a["bias"], "silu", a["initial_state"][i : i + 1], return_final_state=True
        )
        assert torch.equal(packed[:, start:end], out) and torch.equal(states[i : i + 1], state)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 128, 200])
def test_split_equals_whole(cut, device):
    a = make(2, 200, 19, 4, torch.bfloat16, device=device)
    x, state = a.pop("x"), a.pop("initial_state")
    whole, final = rom.ops.causal_conv1d(x, **a, initial_state=state, return_final_state=True)
    first, state = rom.ops.causal_conv1d(x[:, :cut], **a, initial_state=state, return_final_state=True)
    second, state = rom.ops.causal_conv1d(x[:, cut:], **a, initial_state=state, return_final_state=True)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(state, final)


def test_final_state_is_the_newest_inputs():
    a = make(2, 9, 5, 4, torch.bfloat16)
    _, final = rom.ops.causal_conv1d(**a, return_final_state=True)
    assert final.dtype == torch.float32 and torch.equal(final, a["x"][:, -4:].transpose(1, 2).float())
    a = make(2, 3, 5, 4, torch.float32)
    _, final = rom.ops.causal_conv1d(**a, return_final_state=True)
    assert torch.equal(final, torch.cat([a["initial_state"][:, :, -1:], a["x"].transpose(1, 2)], 2))


@pytest.mark.parametrize("rows_per_step", [1, 2])
def test_row_index_is_a_gather(rows_per_step):
    a = make(2, 140, 24, 4, torch.float32, rows_per_step=rows_per_step)
    index = a.pop("row_index")
    gathered = a.pop("x")[index.long()].sum(-2)
    got = rom.ops.causal_conv1d(torch.empty(0) if index is None else gathered, **a)
    table = gathered.new_zeros(index.numel(), 24).index_add(0, index[..., 0].flatten().long(), gathered.flatten(0, 1))
    assert torch.equal(rom.ops.causal_conv1d(table, **a, row_index=index), got)


def test_views_are_read_in_place(monkeypatch):
    """The halves of an input projection's output, and any batch and time strides; only channel strides cost a copy."""
    a = make(2, 70, 32, 4, torch.float32)
    both = torch.randn(2, 70, 64)
    seen = []
    call = conv.native.call
    monkeypatch.setattr(conv.native, "call", lambda *p, **k: (seen.append(k["x"].data_ptr()), call(*p, **k)))
    for view in (both.chunk(2, -1)[1], torch.randn(70, 2, 32).transpose(0, 1), torch.randn(2, 140, 32)[:, ::2]):
        got = rom.ops.causal_conv1d(view, a["weight"], a["bias"], "silu")
        assert seen[-1] == view.data_ptr()
        assert torch.equal(got, rom.ops.causal_conv1d(view.contiguous(), a["weight"], a["bias"], "silu"))
    strided = torch.randn(2, 70, 64)[:, :, ::2]
    assert torch.equal(
        rom.ops.causal_conv1d(strided, a["weight"]), rom.ops.causal_conv1d(strided.contiguous(), a["weight"])
    )


def test_expanded_gradient(device):
    a = make(2, 40, 16, 4, torch.float32, device=device)
    rom.ops.causal_conv1d(**a).sum().backward()
    grads = [a["x"].grad, a["weight"].grad]
    a["x"].grad = a["weight"].grad = None
    out = rom.ops.causal_conv1d(**a)
    out.backward(torch.ones_like(out))
    assert torch.equal(grads[0], a["x"].grad) and torch.equal(grads[1], a["weight"].grad)


@pytest.mark.parametrize("case", ["plain", "packed", "rows"])
def test_gradcheck_runs_the_native_kernel(case):
    kinds = {"plain": {}, "packed": {"cu_seqlens": [0, 2, 2, 9]}, "rows": {"rows_per_step": 2}}[case]
    a = make(1, 9, 3, 4, torch.float64, **kinds)
    index, cu = a.pop("row_index"), a.pop("cu_seqlens")

    def run(*tensors):
        return rom.ops.causal_conv1d(
            **dict(zip(a, tensors)), activation="silu", cu_seqlens=cu, row_index=index, return_final_state=True
        )

    with rom.backend("cpu"):
        assert torch.autograd.gradcheck(run, tuple(a.values()))


def test_double_backward_goes_through_the_reference():
    a = make(1, 4, 2, 3, torch.float64)
    tensors = (a["x"], a["weight"], a["bias"])
    with rom.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: rom.ops.causal_conv1d(*t, activation="silu"), tensors)


def test_reference_backend_of_the_operator():
    a = make(2, 7, 3, 4, torch.float64)

    def run(x, weight, bias, initial_state):
        return torch.ops.rom.causal_conv1d(x, weight, bias, True, initial_state, None, True, None, "reference")

    assert torch.autograd.gradcheck(run, (a["x"], a["weight"], a["bias"], a["initial_state"]))


@pytest.mark.parametrize("width", [1, 5])
def test_other_widths_need_the_reference(width):
    a = make(2, 20, 6, width, torch.float32)
    with pytest.raises(rom.BackendError, match=f"width {width} is not one of"), rom.backend("strict"):
        rom.ops.causal_conv1d(**a)
    with rom.backend("reference"):
        compare(a, "silu")


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_empty(shape, device):
    a = make(*shape, 4, torch.float32, device=device)
    out, final = rom.ops.causal_conv1d(**a, return_final_state=True)
    assert out.shape == shape and final.shape == (shape[0], shape[2], 4)
    if shape[1] == 0:
        assert torch.equal(final, a["initial_state"])
    (out.sum() + final.sum()).backward()
    assert a["weight"].grad.shape == a["weight"].shape and not a["weight"].grad.any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 1e18])
def test_extremes(magnitude, device):
    x = (torch.randn(1, 40, 20, device=device) * magnitude).requires_grad_()
    weight = torch.randn(20, 4, device=device)
    out = rom.ops.causal_conv1d(x, weight, None, "silu")
    expected = reference.causal_conv1d(x.double(), weight, None, "silu")
    assert_close("out", out, expected)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_nan_stays_in_its_window(device):
    x = torch.randn(1, 20, 3, device=device)
    x[0, 7, 1] = float("nan")
    out = rom.ops.causal_conv1d(x, torch.randn(3, 4, device=device), None, "silu")
    bad = out.isnan().nonzero()[:, 1:].tolist()
    assert bad == [[7, 1], [8, 1], [9, 1], [10, 1]]


def test_deterministic_whatever_the_thread_count(device):
    a = make(2, 700, 96, 4, torch.float32, device=device)
    grads = torch.randn(2, 700, 96, device=device), torch.randn(2, 96, 4, device=device)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(rom.ops.causal_conv1d, a, "silu", grads))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


def test_parameters_of_another_dtype():
    a = make(2, 30, 8, 4, torch.bfloat16)
    half = {k: v.detach().bfloat16().requires_grad_() for k, v in a.items() if k in ("weight", "bias", "initial_state")}
    out, final = rom.ops.causal_conv1d(a["x"], **half, return_final_state=True)
    full = {k: v.detach().float() for k, v in half.items()}
    assert torch.equal(out, rom.ops.causal_conv1d(a["x"], **full)) and final.dtype == torch.float32
    (out.sum() + final.sum()).backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.any() for t in half.values())


def test_autocast_casts_x_only():
    a = make(2, 30, 8, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, final = rom.ops.causal_conv1d(**a, return_final_state=True)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    a["x"] = a["x"].bfloat16()
    assert torch.equal(out, rom.ops.causal_conv1d(**a))


@pytest.mark.parametrize(
    "kinds", [{}, {"cu_seqlens": [0, 2, 5]}, {"rows_per_step": 2}], ids=["plain", "packed", "rows"]
)
def test_opcheck(kinds):
    a = make(1, 5, 6, 4, torch.float32, **kinds)
    for final in (True, False):
        torch.library.opcheck(
            torch.ops.rom.causal_conv1d.default,
            (a["x"], a["weight"], a["bias"], True, a["initial_state"], a["cu_seqlens"], final, a["row_index"], "cpu"),
        )


def test_compile_and_export():
    def loss(x, weight, bias, initial_state):
        out, final = rom.ops.causal_conv1d(x * 2, weight, bias, "silu", initial_state, return_final_state=True)
        return out.square().sum() + final.sum()

    a = make(2, 9, 6, 4, torch.float32)
    tensors = [a[k] for k in ("x", "weight", "bias", "initial_state")]
    expected = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for name, g, e in zip(NAMES[2:], got, expected):
        assert_close(name, g, e)

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return rom.ops.causal_conv1d(x, weight)

    program = torch.export.export(Module(), (a["x"].detach(), a["weight"].detach()))
    assert "rom.causal_conv1d" in str(program.graph)


INT = torch.int32


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
        ({"x": torch.ones(4, 8)}, ValueError, r"expected x of shape \[batch, length, dim\], got \(4, 8\)"),
        ({"x": torch.ones(1, 4, 8, dtype=INT)}, TypeError, "expected x of dtype float32"),
        ({"weight": torch.ones(8, 1, 4)}, ValueError, r"weight of shape \(8, width\), got \(8, 1, 4\).*squeeze"),
        ({"weight": torch.ones(7, 4)}, ValueError, r"expected weight of shape \(8, width\), got \(7, 4\)"),
        ({"bias": torch.ones(7)}, ValueError, r"expected bias of shape \(8,\), got \(7,\)"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "expected bias on cpu like x, got meta"),
        ({"activation": "gelu"}, ValueError, 'expected activation None, "silu" or "swish", got \'gelu\''),
        ({"initial_state": torch.ones(1, 8, 3)}, ValueError, r"initial_state of shape \(1, 8, 4\), got \(1, 8, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens of dtype torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0], dtype=INT)}, ValueError, "at least one sequence"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=INT)}, ValueError, r"rise from 0 to the length 4, got \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 3, 1, 4], dtype=INT)}, ValueError, "rise from 0 to the length 4"),
        (
            {"x": torch.ones(2, 4, 8), "cu_seqlens": torch.tensor([0, 4], dtype=INT)},
            ValueError,
            "expected batch 1 with cu_seqlens, got batch 2. Flatten",
        ),
        ({"row_index": torch.zeros(4, 1, dtype=INT)}, ValueError, r"row_index of shape \[batch, length, K\]"),
        ({"row_index": torch.zeros(1, 4, 1, dtype=INT)}, ValueError, r"x of shape \(4, dim\), a row per entry"),
        (
            {"x": torch.ones(4, 8), "row_index": torch.zeros(1, 4, 1, dtype=INT)},
            ValueError,
            "name each of its 4 rows exactly once",
        ),
        (
            {"x": torch.ones(4, 8), "row_index": torch.tensor([0, 1, 2, 2**30], dtype=INT).view(1, 4, 1)},
            ValueError,
            "name each of its 4 rows exactly once",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        rom.ops.causal_conv1d(**({"x": torch.ones(1, 4, 8), "weight": torch.ones(8, 4)} | change))


def test_docstring_example(run_doctests):
    run_doctests(conv)
