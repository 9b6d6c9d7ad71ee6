import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import rom
from rom.ops import _orthogonal_cpu, orthogonal, orthogonal_inverse, orthogonal_products
from rom.reference import orthogonal as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAPS = ["cayley", "householder"]
INVERSES = {"cayley": rom.ops.cayley_inverse, "householder": rom.ops.householder_inverse}
# batches of small matrices; tall, wide and square ones around the sizes at which the kernels change
SHAPES = [(3, 1, 1), (21, 5, 5), (2, 9, 16, 16), (5, 16, 3), (3, 17, 17), (2, 33, 20), (70, 64), (2, 12, 37)]
SHAPES += [(300, 150)]


def make(shape, dtype=torch.float64, device="cpu"):
    """A parameter of the size at which training starts, and signs."""
    x = torch.randn(shape, device=device) / shape[-2] ** 0.5
    return x.to(dtype).requires_grad_(), torch.randn(min(shape[-2:]), device=device)


def by_autograd(name, x, signs):
    """The map by its definition, differentiated by autograd, in x's precision."""
    if x.shape[-2] < x.shape[-1]:
        return by_autograd(name, x.mT, signs).mT
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (getattr(reference, name)(x.to(compute)) * torch.where(signs < 0, -1.0, 1.0)).to(x.dtype)


def with_norm(kind, n, norm):
    """x whose S = (tril x − tril xᵀ)/2 has the given spectral norm: dense, of rank 2, or all eigenvalues ±i norm."""
    s = torch.randn(n, n, dtype=torch.float64)
    if kind == "rank 2":
        s = torch.randn(n, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64)
    if kind == "turns":
        s = torch.linalg.qr(s)[0]
        s = s[:, : n // 2] @ s[:, n // 2 :].mT
    s = s - s.mT
    return (2 * norm / torch.linalg.matrix_norm(s, 2) * s).tril().float()


# ------------------------------------------------------------------------------------------------ values and gradients
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, name, dtype, device):
    x, signs = make(shape, dtype, device)
    q = getattr(rom.ops, name)(x, signs)
    g = torch.randn_like(q)
    grad = torch.autograd.grad(q, x, g)[0]
    plain = by_autograd(name, x, signs)
    x64 = x.detach().double().requires_grad_()
    expected = by_autograd(name, x64, signs)
    assert q.dtype == grad.dtype == dtype and q.shape == grad.shape == x.shape
    assert_close("q", q, expected, plain)
    expected_grad = torch.autograd.grad(expected, x64, g.double())[0]
    if min(shape[-2:]) > 1 or shape[-2] > 1:
        assert_close("x.grad", grad, expected_grad, torch.autograd.grad(plain, x, g)[0])


def test_cayley_saves_nothing_but_q():
    x = torch.randn(3, 12, 12)
    assert torch.ops.rom.cayley(x, None, False, "cpu")[1].numel() == 0
    q, saved = torch.ops.rom.cayley(x.bfloat16(), None, False, "cpu")  # Q before it was rounded
    assert saved.dtype == torch.float32 and torch.equal(q, saved.bfloat16())


@pytest.mark.parametrize("name", MAPS)
def test_matrices_too_large_for_the_native_kernels(name, monkeypatch):
    monkeypatch.setattr(_orthogonal_cpu, "fits", lambda n, k: False)
    test_matches_float64((2, 33, 20), name, torch.bfloat16, "cpu")
    test_matches_float64((2, 20, 20), name, torch.float64, "cpu")


@settings(max_examples=25)
@given(
    batch=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    name=st.sampled_from(MAPS),
)
def test_any_shape(batch, n, k, seed, name):
    torch.manual_seed(seed)
    x, signs = make((batch, n, k), torch.float64)
    q = getattr(rom.ops, name)(x, signs)
    expected = by_autograd(name, x, signs)
    g = torch.randn_like(q)
    assert_close("q", q, expected)
    if n > 1 or k > 1:
        assert_close("x.grad", torch.autograd.grad(q, x, g)[0], torch.autograd.grad(expected, x, g)[0])


def test_cayley_is_that_of_torch():
    """Tall, wide and square, against torch's n × n solve."""
    for shape in [(6, 6), (3, 9, 4), (4, 9)]:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        torch.nn.utils.parametrizations.orthogonal(module, orthogonal_map="cayley", use_trivialization=False)
        assert_close("q", rom.ops.cayley(module.parametrizations.weight.original), module.weight)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 2), (2, 5), (17, 3, 3), (2, 18, 17)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, name):
    x, signs = make(shape)

    def function(x):
        return getattr(rom.ops, name)(x, signs)

    with rom.backend("cpu"):
        assert torch.autograd.gradcheck(function, (x,), fast_mode=x.numel() > 100)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=x.numel() > 30)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (2, 5, 3), (3, 5)], ids=str)
def test_apply(shape, name):
    x, signs = make(shape)
    inp = torch.randn(*shape[:-2], shape[-1], 2, dtype=torch.float64, requires_grad=True)
    inputs, g = (x, inp), torch.randn(*shape[:-1], 2, dtype=torch.float64)

    def function(x, inp):
        return rom.ops.orthogonal_apply(x, inp, name, signs)

    y, expected = function(*inputs), getattr(rom.ops, name)(x, signs) @ inp
    assert_close("y", y, expected)
    for got, e in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g)):
        assert_close("grad", got, e)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
    with rom.backend("reference"):
        assert_close("y", function(*inputs), expected)


def test_one_matrix_applies_to_a_batch():
    x, inp = torch.randn(7, 4), torch.randn(3, 2, 4, 5)
    assert_close("y", rom.ops.orthogonal_apply(x, inp), rom.ops.cayley(x) @ inp)


# ------------------------------------------------------------------------------------------------ orthogonality
@pytest.mark.parametrize("n", [4, 16, 32, 64, 128, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dense", "rank 2"])
@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4])
def test_orthogonality_of_cayley(norm, kind, n):
    x = torch.stack([with_norm(kind, n, norm) for _ in range(20 if n <= 64 else 4)])
    skew = (x - x.mT) / 2
    eye = torch.eye(n)
    error, polished = (rom.ops.orthogonality_error(rom.ops.cayley(x, polish=p)) for p in (False, True))
    if norm <= 10:
        growth = max(1.0, (n / 64) ** 0.5)
        assert error.max() <= 3e-6 * growth and polished.max() <= 1e-6 * growth
    else:
        solved = rom.ops.orthogonality_error(torch.linalg.solve(eye - skew, eye + skew))
        assert error.max() <= 2 * solved.max() and polished.max() <= 5e-6


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("kind", ["dense", "rank 2", "turns"])
@pytest.mark.parametrize("norm", [1.0, 30.0, 1e4])
def test_gradients_of_cayley_far_from_the_origin(norm, kind, n, device):
    """The gradient needs R = (Q + I)/2, which is as small as 1e-4 where all angles are near 180°."""
    x = torch.stack([with_norm(kind, n, norm) for _ in range(20)]).to(device)
    x[7:9] = torch.stack([with_norm("dense", n, 1.0) for _ in range(2)])  # lanes of both kinds
    g = torch.randn_like(x)

    def gradient(function, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, g.to(x.dtype))[0]

    def solved(x):
        skew, eye = (x.tril() - x.tril().mT) / 2, torch.eye(n, dtype=x.dtype, device=device)
        return torch.linalg.solve(eye - skew, eye + skew)

    expected = gradient(solved, x.double())
    got, plain = (
        (gradient(f, x).double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        for f in (rom.ops.cayley, solved)
    )
    assert got.max() <= 2 * plain.max() + 5e-7


@pytest.mark.parametrize("shape", [(64, 64), (20, 16, 16), (512, 64), (300, 150)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_orthogonality_of_householder(scale, shape):
    x = scale * torch.randn(shape) / shape[-2] ** 0.5
    error, polished = (rom.ops.orthogonality_error(rom.ops.householder(x, polish=p)).max() for p in (False, True))
    growth = max(1.0, (shape[-1] / 64) ** 0.5)
    assert error <= 8e-6 * growth and polished <= 1e-6 * growth  # reflectors near the axes (0.1): 2 to 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(5, 64, 64).to(dtype)
    for name in MAPS:
        assert torch.equal(getattr(rom.ops, name)(x), getattr(rom.ops, name)(x.float()).to(dtype))


def test_orthogonality_error():
    q = torch.eye(3)[:2]
    q[0, 1] = 0.25
    assert rom.ops.orthogonality_error(q).item() == rom.ops.orthogonality_error(q.mT).item() == 0.25
    assert rom.ops.orthogonality_error(torch.ones(2, 3, 0)).tolist() == [0, 0]
    assert rom.ops.orthogonality_error(torch.eye(2, dtype=torch.complex64) * 1j) == 0


# ------------------------------------------------------------------------------------------------ inverses
def orthonormal(shape):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (3, 12, 5), (128, 127), (2, 5, 12), (150, 100), (9, 8, 8)], ids=str
)
def test_inverse_round_trip(shape, name):
    tall = orthonormal((*shape[:-2], max(shape[-2:]), min(shape[-2:])))
    q64 = tall if shape[-2] >= shape[-1] else tall.mT
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q = q64.to(dtype)
        x, signs = INVERSES[name](q)
        assert x.dtype == signs.dtype == dtype and x.shape == q.shape and (signs.abs() == 1).all()
        assert (getattr(rom.ops, name)(x, signs) - q).abs().max() <= bound


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_both_determinants_are_reachable(n, name):
    q = orthonormal((n, n))
    flipped = q.clone()
    flipped[:, 0] *= -1
    signed = torch.eye(n, dtype=torch.float64) * torch.where(torch.randn(n) < 0, -1.0, 1.0)
    for target in (q, flipped, signed, -torch.eye(n, dtype=torch.float64)):
        x, signs = INVERSES[name](target)
        back = getattr(rom.ops, name)(x, signs)
        assert (back - target).abs().max() < 1e-12
        assert torch.linalg.det(back).sign() == torch.linalg.det(target).sign()


def test_only_the_sign_of_the_signs_is_read():
    x, signs = torch.randn(3, 6, 4), torch.tensor([1.0, -1.0, -1.0, 1.0])
    for worn in (signs * 0.0071, signs * (1 - 2**-20), signs.double(), signs.to(torch.int8), signs.expand(3, 4)):
        assert torch.equal(rom.ops.cayley(x, worn), rom.ops.cayley(x) * signs)


# ------------------------------------------------------------------------------------------------ contracts
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0), (2, 0, 0), (0, 5)], ids=str)
def test_empty(shape, name):
    x = torch.randn(shape, requires_grad=True)
    q = getattr(rom.ops, name)(x)
    q.sum().backward()
    assert q.shape == x.grad.shape == shape
    assert rom.ops.orthogonal_apply(x, torch.randn(*shape[:-2], shape[-1], 2), name).shape == (*shape[:-1], 2)


@pytest.mark.parametrize("name", MAPS)
def test_non_contiguous_inputs(name):
    x = torch.randn(6, 8, 20, 2)[..., 0].transpose(0, 1)[:, :, ::2]
    function = getattr(rom.ops, name)
    assert torch.equal(function(x), function(x.contiguous()))
    leaf = x.detach().requires_grad_()
    g = torch.randn(8, 10, 6).mT
    got, expected = (torch.autograd.grad(function(leaf), leaf, grad)[0] for grad in (g, g.contiguous()))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(100, 7, 7), (200, 12, 12), (9, 40, 30), (1, 210, 190)], ids=str)
def test_deterministic_whatever_the_thread_count(shape, name):
    x, signs = make(shape, torch.float32)
    g, runs = torch.randn(shape), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        q = getattr(rom.ops, name)(x, signs)
        runs.append((q, torch.autograd.grad(q, x, g)[0]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_complex_runs_on_the_reference():
    x = torch.randn(3, 5, 4, dtype=torch.complex128, requires_grad=True)
    with rom.backend("reference"):
        assert rom.ops.orthogonality_error(rom.ops.cayley(x)).max() < 1e-14
        assert torch.autograd.gradcheck(rom.ops.cayley, (x,))
    with pytest.raises(TypeError, match="expected a real x"):
        rom.ops.householder(x)


@pytest.mark.parametrize("name", MAPS)
def test_polish_has_the_gradient_of_the_map(name):
    x, signs = make((3, 9, 5))
    for backend in ("cpu", "reference"):
        with rom.backend(backend):
            g = torch.randn(3, 9, 5, dtype=torch.float64)
            plain, polished = (
                torch.autograd.grad(getattr(rom.ops, name)(x, signs, polish=p), x, g)[0] for p in (False, True)
            )
            assert_close("grad", polished, plain)


def test_autocast_leaves_the_maps_alone():
    x, inp = torch.randn(6, 40, 40), torch.randn(6, 40, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rom.ops.cayley(x), rom.ops.householder(x), rom.ops.orthogonal_apply(x, inp)
    assert all(
        torch.equal(g, e)
        for g, e in zip(got, (rom.ops.cayley(x), rom.ops.householder(x), rom.ops.orthogonal_apply(x, inp)))
    )


@pytest.mark.parametrize("shape", [(2, 7, 3), pytest.param((2, 20, 17), marks=pytest.mark.slow)], ids=str)
def test_opcheck(shape):
    x, signs = make(shape, torch.float32)
    for name in MAPS:
        for backend in ("cpu", "reference"):
            arguments = (x, signs.expand(shape[0], -1), False, backend)
            torch.library.opcheck(getattr(torch.ops.rom, name).default, arguments)
        inp = torch.randn(shape[0], shape[2], 2, requires_grad=True)
        torch.library.opcheck(torch.ops.rom.orthogonal_apply.default, (x, inp, name, False, "cpu"))
        other = torch.randn(shape[0], shape[1], 2, requires_grad=True)
        torch.library.opcheck(torch.ops.rom.orthogonal_apply.default, (x, other, name, True, "cpu"))


def test_compile_and_export():
    def loss(x, inp):
        wide = rom.ops.householder(x.mT)
        return (rom.ops.cayley(x) * wide.mT).sum() + rom.ops.orthogonal_apply(x * 2, inp, "householder").sin().sum()

    inputs = torch.randn(3, 8, 5, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, g, e in zip(("x", "inp"), torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert_close(name, g, e)

    class Module(torch.nn.Module):
        def forward(self, x):
            return rom.ops.cayley(x)

    assert "rom.cayley" in str(torch.export.export(Module(), (torch.randn(4, 3),)).graph)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rom.ops.cayley(torch.ones(3)), ValueError, r"x of shape \[\.\.\., n, k\], got \(3,\)"),
        (lambda: rom.ops.cayley([1.0]), TypeError, "expected x to be a tensor, got list"),
        (lambda: rom.ops.householder(torch.ones(3, 3, dtype=torch.int32)), TypeError, "expected x of dtype float32"),
        (lambda: rom.ops.cayley(torch.ones(4, 3), torch.ones(4)), ValueError, r"signs of shape \(3,\).*got \(4,\)"),
        (lambda: rom.ops.cayley(torch.ones(2, 4, 3), torch.ones(5, 3)), ValueError, r"signs of shape \(2, 3\)"),
        (lambda: rom.ops.cayley(torch.ones(4, 3), torch.tensor(1.0)), ValueError, r"signs of shape \(3,\)"),
        (lambda: rom.ops.orthogonal_apply(torch.ones(4, 3), torch.ones(3)), ValueError, r"v\.unsqueeze"),
        (lambda: rom.ops.orthogonal_apply(torch.ones(4, 3), torch.ones(4, 1)), ValueError, r"inp of shape \(3,\)"),
        (lambda: rom.ops.orthogonal_apply(torch.ones(2, 4, 3), torch.ones(3, 1)), ValueError, r"of shape \(2, 3\)"),
        (lambda: rom.ops.orthogonal_apply(torch.ones(4, 3), torch.ones(3, 1), "qr"), ValueError, 'map "cayley" or'),
        (lambda: rom.ops.orthogonal_apply(torch.ones(4, 3), torch.ones(3, 1).half()), TypeError, "inp of dtype"),
        (lambda: rom.ops.cayley_inverse(torch.ones(3)), ValueError, r"q of shape \[\.\.\., n, k\]"),
        (lambda: rom.ops.orthogonality_error(torch.ones(3)), ValueError, r"q of shape \[\.\.\., n, k\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("module", [orthogonal, orthogonal_products, orthogonal_inverse], ids=lambda m: m.__name__)
def test_docstring_examples(module, run_doctests):
    run_doctests(module)
