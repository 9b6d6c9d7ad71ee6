import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.ops import norm
from rom.reference import norm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (x, residual stream): a float32 stream carries low-precision blocks
PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def make(shape, x_dtype, residual_dtype, device="cpu", residual=True):
    x = torch.randn(shape, device=device).to(x_dtype).requires_grad_()
    stream = torch.randn(shape, device=device).to(residual_dtype).requires_grad_() if residual else None
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    return x, weight, stream


def outputs_and_gradients(function, x, weight, residual, grads, **options):
    y, total = function(x, weight, residual, **options)
    inputs = [t for t in (x, weight, residual) if t is not None]
    gradients = torch.autograd.grad((y, total), inputs, tuple(g.to(o.dtype) for g, o in zip(grads, (y, total))))
    return [y, total, *gradients]


def compare(shape, x_dtype, residual_dtype, device, residual=True, scale=1.0):
    x, weight, stream = make(shape, x_dtype, residual_dtype, device, residual)
    grads = torch.randn(shape, device=device), torch.randn(shape, device=device)
    in64 = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, stream)]
    got = outputs_and_gradients(rom.ops.add_rms_norm, x, weight, stream, grads)
    plain = outputs_and_gradients(reference.add_rms_norm, x, weight, stream, grads)
    rounded = [g.to(o.dtype).double() for g, o in zip(grads, got)]  # what the low-precision run is really given
    expected = outputs_and_gradients(reference.add_rms_norm, *in64, rounded)
    for name, g, p, e in zip(("y", "sum", "x.grad", "weight.grad", "residual.grad"), got, plain, expected):
        # The backward pass reads the sum as it was rounded into the residual stream.
        assert_close(name, g, e, p, scale, dtype=residual_dtype if name == "weight.grad" else None)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "first-block"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))
def test_matches_float64(dtypes, residual, device):
    compare((3, 65, 37), *dtypes, device, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 37), (5, 64, 2048), (3, 12304), (40000, 128)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_kernels(backend, dtypes, shape):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    with rom.backend(backend):
        compare(shape, *dtypes, "cuda")
        x, weight, residual = make(shape, *dtypes, "cuda")
        runs = [outputs_and_gradients(rom.ops.add_rms_norm, x, weight, residual, (x, x)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@settings(max_examples=30)
@given(rows=st.integers(1, 140), dim=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_any_shape(rows, dim, seed):
    torch.manual_seed(seed)
    # A gradient of very few elements may cancel: 110 terms of size 1 that sum to 0.1 lose one more digit.
    compare((rows, dim), torch.float32, torch.float32, "cpu", scale=1.0 if dim > 8 else 20.0)


def test_gradcheck_runs_the_native_kernel(monkeypatch):
    x, weight, residual = make((5, 7), torch.float64, torch.float64)
    with rom.backend("cpu"):
        assert torch.autograd.gradcheck(rom.ops.add_rms_norm, (x, weight.detach().double().requires_grad_(), residual))


def test_double_backward_goes_through_the_reference():
    x, weight, residual = make((3, 4), torch.float64, torch.float64)
    with rom.backend("reference"):
        assert torch.autograd.gradgradcheck(
            rom.ops.add_rms_norm, (x, weight.detach().double().requires_grad_(), residual)
        )


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_empty(shape):
    x, weight, residual = make(shape, torch.float32, torch.float32)
    y, total = rom.ops.add_rms_norm(x, weight, residual)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_non_contiguous_inputs():
    x = torch.randn(6, 10, 16).transpose(0, 1)[:, :, ::2]
    weight, residual = torch.randn(16)[::2], torch.randn(10, 6, 8)
    got = rom.ops.add_rms_norm(x, weight, residual)
    expected = rom.ops.add_rms_norm(x.contiguous(), weight.contiguous(), residual)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("magnitude", [1e-20, 1e15])
def test_extremes(magnitude):
    x, weight = torch.randn(4, 33, dtype=torch.float64) * magnitude, torch.ones(33)
    y, _ = rom.ops.add_rms_norm(x.float(), weight, eps=1e-30)
    expected, _ = reference.add_rms_norm(x.float().double(), weight, eps=1e-30)
    assert_close("y", y, expected, scale=2 if magnitude < 1 else 1)  # the squares near 1e-40 lose bits as subnormals


def test_deterministic_whatever_the_thread_count():
    x, weight, residual = make((1000, 96), torch.float32, torch.float32)
    grads = torch.randn_like(x), torch.randn_like(x)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(rom.ops.add_rms_norm, x, weight, residual, grads))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual):
    x, weight, stream = make((2, 5, 7), torch.float32, torch.float32, residual=residual)
    torch.library.opcheck(torch.ops.rom.add_rms_norm.default, (x, weight, stream, 1e-5, "cpu"))


def test_compile_and_export():
    def loss(x, weight, residual):
        y, total = rom.ops.add_rms_norm(x * 2, weight, residual)
        return (y * total).sum()

    x, weight, residual = make((4, 9), torch.float32, torch.float32)
    expected = torch.autograd.grad(loss(x, weight, residual), (x, weight, residual))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight, residual), (x, weight, residual))
    for name, g, e in zip(("x", "weight", "residual"), got, expected):
        assert_close(name, g, e)

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return rom.ops.add_rms_norm(x, weight)

    program = torch.export.export(Module(), (x.detach(), weight.detach()))
    assert "rom.add_rms_norm" in str(program.graph)


def test_autocast_keeps_the_dtype_of_x():
    x, weight, residual = make((3, 8), torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, total = rom.ops.add_rms_norm(x, weight, residual)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.ones(3)}, ValueError, r"expected weight of shape \(8,\), got \(3,\)"),
        ({"residual": torch.ones(2, 8)}, ValueError, r"expected residual of shape \(4, 8\), got \(2, 8\)"),
        ({"residual": torch.ones(4, 8).half()}, TypeError, "residual stream of torch.float32"),
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, TypeError, "expected x of dtype float32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x of shape \[\.\.\., D\]"),
        ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "expected weight on cpu like x, got meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(4, 8), "weight": torch.ones(8), "residual": None} | change
    with pytest.raises(error, match=message):
        rom.ops.add_rms_norm(**arguments)


def test_docstring_example(run_doctests):
    run_doctests(norm)
