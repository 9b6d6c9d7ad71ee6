"""`orthogonal_apply`: an orthogonal matrix times a few columns, without the matrix."""

from __future__ import annotations

import torch

from rom import dispatch
from rom.ops import _op
from rom.ops import _orthogonal_library as library
from rom.ops.orthogonal import check_matrix, check_signs, second_order
from rom.reference import orthogonal as reference

MAPS = ("cayley", "householder")
# y and what the gradient needs: factors of K or L, their pivots (none for Householder), the solution v or s
Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def orthogonal_apply(
    x: torch.Tensor, inp: torch.Tensor, map: str = "cayley", signs: torch.Tensor | None = None
) -> torch.Tensor:
    """Q(x) · inp without forming Q, for fewer columns than Q has.

    One factorisation of a k × k matrix serves both passes, and the gradient of x has the rank of inp: with m columns
    4k²m + 4nkm operations instead of the 4nk² that a formed Q costs in the backward pass alone.

    Args:
        x: `[..., n, k]` as for `cayley` and `householder`; wide, it applies Q(xᵀ)ᵀ. float32, bfloat16, float16 or
            float64.
        inp: `[..., k, m]` in x's dtype. Its batch dimensions are x's, or any where x has none.
        map: "cayley" or "householder".
        signs: `[..., min(n, k)]` as for `cayley`.

    Returns:
        `[..., n, m]` in x's dtype, computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not match or the map is another. TypeError: a dtype is not floating, or the two differ.

    Source: orthogonal maps as in `cayley` and `householder`. Not cast by autocast.

    >>> rom.ops.orthogonal_apply(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0], [1.0]]))
    tensor([[-1.],
            [ 3.]])
    """
    _validate(x, inp, map, signs)
    n, k = x.shape[-2:]
    if x.dim() == 2 and inp.dim() > 2:  # one matrix for all: the batch becomes columns
        columns = inp.movedim(-2, 0)
        out = orthogonal_apply(x, columns.flatten(1), map, signs)
        return out.view(n, *columns.shape[1:]).movedim(0, -2)
    transpose = n < k
    tall = x.mT if transpose else x
    if signs is not None:
        factors = library.factors(signs.detach(), x).mT
        inp = inp if transpose else factors * inp
    backend = dispatch.choose("orthogonal_apply", x.device.type)
    if backend == "reference" and not torch.compiler.is_compiling():
        out = _reference(tall, inp, map, transpose)
    else:
        batch = x.shape[:-2].numel()
        flat = tall.reshape(batch, *tall.shape[-2:]), inp.reshape(batch, *inp.shape[-2:])
        out = torch.ops.rom.orthogonal_apply(*flat, map, transpose, backend)[0].view(*x.shape[:-1], inp.shape[-1])
    return factors * out if signs is not None and transpose else out


def _validate(x: torch.Tensor, inp: torch.Tensor, map: str, signs: torch.Tensor | None) -> None:
    op = "orthogonal_apply"
    _op.check_tensors(op, "x", x=x, inp=inp, signs=signs)
    check_matrix(op, "x", x)
    _op.check_same_dtype(op, "x", x=x, inp=inp)
    if map not in MAPS:
        _op.fail(op, 'map "cayley" or "householder"', repr(map))
    expected = f"inp of shape {(*x.shape[:-2], x.shape[-1])} followed by its columns"
    batched = x.dim() > 2 and inp.shape[:-2] != x.shape[:-2]
    if inp.dim() < 2 or inp.shape[-2] != x.shape[-1] or batched:
        _op.fail(op, expected, str(_op.shape(inp)), "A vector is inp of one column: v.unsqueeze(-1).")
    check_signs(op, signs, x)


def _reference(x: torch.Tensor, inp: torch.Tensor, map: str, transpose: bool) -> torch.Tensor:
    compute = _op.compute_dtype(x.dtype)
    with _op.without_autocast(x.device.type):
        function = reference.apply_cayley if map == "cayley" else reference.apply_householder
        return function(x.to(compute), inp.to(compute), transpose).to(x.dtype)


# ------------------------------------------------------------------------------------------------ Cayley
def _cayley_forward(x: torch.Tensor, inp: torch.Tensor, transpose: bool) -> Saved:
    """v = R·inp, y = [2v − inp; B v];  transposed v = Rᵀ (2 inp₁ + Bᵀ inp₂), y = v − inp₁."""
    k = x.shape[-1]
    below = x[:, k:]
    factors, pivots, _ = torch.linalg.lu_factor_ex(reference.accretive(x))
    if transpose:
        top = inp[:, :k]
        v = torch.linalg.lu_solve(factors, pivots, 2 * top + below.mT @ inp[:, k:], adjoint=True)
        return v - top, factors, pivots, v
    v = torch.linalg.lu_solve(factors, pivots, inp)
    return torch.cat((2 * v - inp, below @ v), -2), factors, pivots, v


def _cayley_backward(
    grad: torch.Tensor, x: torch.Tensor, inp: torch.Tensor, saved: Saved, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One solve with the same factors, u; K̄ = −u vᵀ (transposed −v uᵀ), from which X̄ follows as in `cayley`."""
    _, factors, pivots, v = saved
    k = x.shape[-1]
    below = x[:, k:]
    if transpose:
        u = torch.linalg.lu_solve(factors, pivots, grad)
        grad_inp, grad_k = torch.cat((2 * u - grad, below @ u), -2), v @ u.mT
        grad_below = inp[:, k:] @ u.mT
    else:
        top = grad[:, :k]
        u = torch.linalg.lu_solve(factors, pivots, 2 * top + below.mT @ grad[:, k:], adjoint=True)
        grad_inp, grad_k = u - top, u @ v.mT  # −K̄
        grad_below = grad[:, k:] @ v.mT
    grad_top = ((grad_k - grad_k.mT) / 2).tril(-1)
    return torch.cat((grad_top, grad_below - below @ (grad_k + grad_k.mT) / 4), -2), grad_inp


# ------------------------------------------------------------------------------------------------ Householder
def _householder_forward(x: torch.Tensor, inp: torch.Tensor, transpose: bool) -> Saved:
    """s = L⁻¹ V₁ᵀ inp, y = [inp; 0] − V s;  transposed s = L⁻ᵀ Vᵀ inp, y = inp₁ − V₁ s."""
    k = x.shape[-1]
    v, upper = reference.reflectors(x)
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    if transpose:
        s = torch.linalg.solve_triangular(upper.mT, v.mT @ inp, upper=False)
        return inp[:, :k] - v[:, :k] @ s, upper, none, s
    s = torch.linalg.solve_triangular(upper, v[:, :k].mT @ inp, upper=True)
    y = -(v @ s)
    y[:, :k] += inp
    return y, upper, none, s


def _householder_backward(
    grad: torch.Tensor, x: torch.Tensor, inp: torch.Tensor, saved: Saved, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """c = −L⁻ᵀ Vᵀ grad (transposed −L⁻¹ V₁ᵀ grad) is the gradient of what L was solved for; L̄ = −c sᵀ, or −s cᵀ."""
    _, upper, _, s = saved
    k = x.shape[-1]
    v = x.tril(-1)
    v.diagonal(dim1=-2, dim2=-1).fill_(1)
    if transpose:
        c = -torch.linalg.solve_triangular(upper, v[:, :k].mT @ grad, upper=True)
        grad_inp, grad_v, lower = v @ c, inp @ c.mT, s @ c.mT
        grad_inp[:, :k] += grad
        grad_v[:, :k] -= grad @ s.mT
    else:
        c = -torch.linalg.solve_triangular(upper.mT, v.mT @ grad, upper=False)
        grad_inp, grad_v, lower = grad[:, :k] + v[:, :k] @ c, -(grad @ s.mT), c @ s.mT
        grad_v[:, :k] += inp @ c.mT
    lower = lower.triu_()  # −L̄
    return (grad_v - v @ (lower + lower.triu(1).mT)).tril_(-1), grad_inp


def _forward(x: torch.Tensor, inp: torch.Tensor, map: str, transpose: bool, backend: str) -> Saved:
    compute = _op.compute_dtype(x.dtype)
    with _op.without_autocast(x.device.type), library.matmul_precision(x, "ieee"):
        run = _cayley_forward if map == "cayley" else _householder_forward
        y, factors, pivots, solution = run(x.to(compute), inp.to(compute), transpose)
    # strides are part of the operator's promise to the compiler, and LAPACK's are column-major
    return y.to(x.dtype).contiguous(), factors.contiguous(), pivots, solution.contiguous()


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    inp: torch.Tensor,
    factors: torch.Tensor,
    pivots: torch.Tensor,
    solution: torch.Tensor,
    map: str,
    transpose: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = _op.compute_dtype(x.dtype)
    with _op.without_autocast(x.device.type), library.matmul_precision(x, "ieee"):
        run = _cayley_backward if map == "cayley" else _householder_backward
        saved = (grad, factors, pivots, solution)
        grad_x, grad_inp = run(grad.to(compute), x.to(compute), inp.to(compute), saved, transpose)
    return grad_x.to(x.dtype).contiguous(), grad_inp.to(inp.dtype).contiguous()


# ------------------------------------------------------------------------------------------------ registration
for _backend in ("cuda", "cpu", "reference"):  # library routines everywhere: a factorisation and thin products
    dispatch.register("orthogonal_apply", _backend, _forward, _backward)
_op.define(
    "orthogonal_apply(Tensor x, Tensor inp, str map, bool transpose, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_op.define(
    "orthogonal_apply_backward(Tensor grad, Tensor x, Tensor inp, Tensor factors, Tensor pivots, Tensor solution,"
    " str map, bool transpose, str backend) -> (Tensor, Tensor)"
)
_op.LIBRARY.impl("orthogonal_apply", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("orthogonal_apply_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::orthogonal_apply")
def _(x, inp, map, transpose, backend):  # type: ignore[no-untyped-def]
    (batch, n, k), m, compute = x.shape, inp.shape[-1], _op.compute_dtype(x.dtype)
    return (
        x.new_empty(batch, k if transpose else n, m),
        x.new_empty((batch, k, k), dtype=compute),
        x.new_empty((batch, k) if map == "cayley" else (0,), dtype=torch.int32),
        x.new_empty((batch, k, m), dtype=compute),
    )


@torch.library.register_fake("rom::orthogonal_apply_backward")
def _(grad, x, inp, factors, pivots, solution, map, transpose, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), inp.new_empty(inp.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, inp, ctx.map, ctx.transpose, ctx.backend = inputs
    ctx.save_for_backward(x, inp, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for them


def _autograd(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, inp, *saved = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # a second derivative is wanted
        grads = second_order(lambda x, inp: _reference(x, inp, ctx.map, ctx.transpose), (x, inp), grad)
    else:
        grads = torch.ops.rom.orthogonal_apply_backward(grad, x, inp, *saved, ctx.map, ctx.transpose, ctx.backend)
    return *grads, None, None, None


torch.library.register_autograd("rom::orthogonal_apply", _autograd, setup_context=_setup)
