"""The orthogonal maps' GPU backend: native kernels; Newton–Schulz on tensor cores, whose rounding is emulated here."""

from contextlib import contextmanager

import pytest
import torch
from tolerance import assert_close, errors
from torch.overrides import TorchFunctionMode

import rom
from rom.ops import _orthogonal_cuda, _orthogonal_library
from rom.reference import orthogonal as reference

MAPS = ["cayley", "householder"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# every team (16, 32, 64, 128 columns), a last block that is not full, tall in one launch and in three, above 128
SHAPES = [(5, 7, 7), (1030, 16, 16), (70, 33, 20), (3, 64, 64), (150, 100, 36), (2, 128, 128), (3, 190, 100)]
SHAPES += [(1, 2048, 64), (2, 600, 17), (2, 40, 200), (2, 300, 150), (256, 256), (1, 1)]


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    with rom.backend("cuda"):
        yield torch.device("cuda")


@pytest.fixture(params=["ieee", "tf32"])
def user_precision(request):
    """What the user allows float32 products in: none of the maps' business."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


def make(shape, dtype, device):
    x = torch.randn(shape, device=device) / shape[-2] ** 0.5
    return x.to(dtype).requires_grad_(), torch.randn(min(shape[-2:]), device=device)


def by_autograd(name, x, signs):
    if x.shape[-2] < x.shape[-1]:
        return by_autograd(name, x.mT, signs).mT
    return getattr(reference, name)(x) * torch.where(signs < 0, -1.0, 1.0).to(x.dtype)


def norms(n, norm, kind, device):
    """x whose S = (tril x − tril xᵀ)/2 has the given spectral norm: dense, or of rank 2."""
    s = torch.randn(n, n, dtype=torch.float64)
    if kind == "rank 2":
        s = torch.randn(n, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64)
    s = s - s.mT
    return (2 * norm / torch.linalg.matrix_norm(s, 2) * s).tril().float().to(device)


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_matches_float64(name, shape, dtype, cuda, user_precision):
    x, signs = make(shape, dtype, cuda)
    q = getattr(rom.ops, name)(x, signs)
    g = torch.randn_like(q)
    grad = torch.autograd.grad(q, x, g)[0]
    x64 = x.detach().double().requires_grad_()
    expected = by_autograd(name, x64, signs)
    with _orthogonal_library.matmul_precision(x, "ieee"):
        leaf = x.detach().to(grad_dtype := torch.promote_types(dtype, torch.float32)).requires_grad_()
        plain = by_autograd(name, leaf, signs)
        plain_grad = torch.autograd.grad(plain, leaf, g.to(grad_dtype))[0]
    assert q.dtype == grad.dtype == dtype
    assert_close("q", q, expected, plain)
    if max(shape[-2:]) > 1:
        assert_close("x.grad", grad, torch.autograd.grad(expected, x64, g.double())[0], plain_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [4, 16, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("kind", ["dense", "rank 2"])
@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 7.0, 10.0, 30.0, 100.0, 1e3, 1e4])
def test_orthogonality_of_cayley(norm, kind, n, cuda, user_precision):
    """TF32 that the user allows does no harm, nor that of the Newton–Schulz steps."""
    x = torch.stack([norms(n, norm, kind, cuda) for _ in range(20 if n <= 64 else 2)])
    skew = (x - x.mT) / 2
    error, polished = (rom.ops.orthogonality_error(rom.ops.cayley(x, polish=p)).max() for p in (False, True))
    if norm <= 10:
        growth = max(1.0, (n / 64) ** 0.5)
        assert error <= 3e-6 * growth and polished <= 1e-6 * growth
    else:
        eye = torch.eye(n, device=cuda)
        solved = rom.ops.orthogonality_error(torch.linalg.solve(eye - skew, eye + skew))
        assert error <= 2 * solved.max() and polished <= 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (20, 16, 16), (512, 64), (300, 150), (1024, 1024)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_orthogonality_of_householder(scale, shape, cuda, user_precision):
    x = scale * torch.randn(shape, device=cuda) / shape[-2] ** 0.5
    error, polished = (rom.ops.orthogonality_error(rom.ops.householder(x, polish=p)).max() for p in (False, True))
    growth = max(1.0, (shape[-1] / 64) ** 0.5)
    assert error <= 8e-6 * growth and polished <= 1e-6 * growth


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(1030, 16, 16), (3, 64, 64), (1, 2048, 64)], ids=str)
def test_deterministic_and_never_waits(shape, name, cuda):
    x, signs = make(shape, torch.float32, cuda)
    g, runs = torch.randn(shape, device=cuda), []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            q = getattr(rom.ops, name)(x, signs)
            runs.append((q, torch.autograd.grad(q, x, g)[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
def test_cuda_graph(name, cuda):
    x = make((5, 20, 20), torch.float32, cuda)[0].detach()
    function = getattr(rom.ops, name)
    function(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = function(x)
    x.mul_(0.5)
    graph.replay()
    assert_close("q", q, by_autograd(name, x.double(), torch.ones(20, device=cuda)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 2), (2, 5), (2, 18, 17), (1, 300, 3)], ids=str)
def test_gradcheck(shape, name, cuda):
    x, signs = make(shape, torch.float64, cuda)

    def function(x):
        return getattr(rom.ops, name)(x, signs)

    assert torch.autograd.gradcheck(function, (x,), fast_mode=x.numel() > 100)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=x.numel() > 30)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
def test_inputs_of_any_form(name, cuda):
    """Strides, empty batches, signs of any type, half precision rounded once, fewer columns than the GPU could take."""
    function = getattr(rom.ops, name)
    x = torch.randn(6, 8, 20, 2, device=cuda)[..., 0].transpose(0, 1)[:, :, ::2]
    assert torch.equal(function(x), function(x.contiguous()))
    for shape in ((0, 3, 3), (4, 0), (2, 0, 0), (0, 5)):
        assert function(torch.randn(shape, device=cuda)).shape == shape
    x, signs = torch.randn(3, 6, 4, device=cuda), torch.tensor([1.0, -1.0, -1.0, 1.0], device=cuda)
    for worn in (signs * 0.0071, signs.double(), signs.to(torch.int8), signs.half(), signs.expand(3, 4)):
        assert torch.equal(function(x, worn), function(x) * signs)
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.randn(5, 64, 64, device=cuda).to(dtype)
        for polish in (False, True):
            assert torch.equal(function(half, polish=polish), function(half.float(), polish=polish).to(dtype))


@pytest.mark.gpu
def test_compile(cuda):
    def loss(x, inp):
        return (rom.ops.cayley(x) * rom.ops.householder(x.mT).mT).sum() + rom.ops.orthogonal_apply(x, inp).sin().sum()

    inputs = [torch.randn(3, n, k, device=cuda, requires_grad=True) for n, k in ((8, 5), (5, 2))]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True)
    for name, got, e in zip(("x", "inp"), torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert_close(name, got, e)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAPS)
def test_a_gpu_with_little_shared_memory(name, cuda, monkeypatch):
    monkeypatch.setattr(_orthogonal_cuda, "_most_columns", lambda device, dtype: 64)
    x, signs = make((2, 100, 90), torch.float32, cuda)
    q = getattr(rom.ops, name)(x, signs)
    assert_close("q", q, by_autograd(name, x.detach().double(), signs))
    q.sum().backward()
    assert torch.isfinite(x.grad).all()


# ------------------------------------------------------------------------------------------------ Newton–Schulz
class RoundedToTF32(TorchFunctionMode):
    """Products as tensor cores do them: factors rounded to 10 bits, sums in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        factors = {torch.Tensor.__matmul__: (0, 1), torch.baddbmm: (1, 2)}.get(function, ())
        args = [self.rounded(x) if i in factors else x for i, x in enumerate(args)]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """How often float32 products were switched to TF32, which is emulated."""
    entered = []

    @contextmanager
    def precision(like, precision):
        entered.append(precision)
        if precision == "ieee":
            yield
        else:
            with RoundedToTF32():
                yield

    monkeypatch.setattr(_orthogonal_library, "matmul_precision", precision)
    return entered


@pytest.mark.parametrize("kind", ["dense", "rank 2"])
@pytest.mark.parametrize("norm", [0.1, 1.0, 6.0, 100.0])
def test_inverse_by_newton_schulz(norm, kind, tensor_cores):
    n = 200
    x = norms(n, norm, kind, "cpu")
    m = reference.accretive(x)[None]
    inverse = _orthogonal_cuda.accretive_inverse(m)
    by_lu, exact = torch.linalg.inv(m), torch.linalg.inv(m.double())
    assert tensor_cores.count("ieee") == (norm < 100)  # beyond, LU
    error = rom.ops.orthogonality_error(2 * inverse - torch.eye(n))
    assert error <= 3e-6 * (n / 64) ** 0.5
    assert errors(inverse, exact)[0] <= 4e-6 + 4 * errors(by_lu, exact)[0]


def test_newton_schulz_polish_on_tensor_cores(tensor_cores):
    q = reference.cayley(norms(96, 1.0, "dense", "cpu")) + 1e-5 * torch.randn(96, 96)
    assert rom.ops.orthogonality_error(_orthogonal_library.polished(q[None])) < 1e-6
    assert tensor_cores == ["ieee", "tf32"]


def test_what_is_not_finite_gets_lu(tensor_cores):
    inverse = _orthogonal_cuda.accretive_inverse(torch.full((1, 4, 4), float("nan")))
    assert inverse.isnan().all() and "ieee" not in tensor_cores


def test_steps_of_newton_schulz():
    """Quadratic: every step squares the residual, and four times the norm wants two more."""
    assert [_orthogonal_cuda.steps(b) for b in (1.0, 2.0, 16.0, 256.0)] == [0, 2, 5, 9]
