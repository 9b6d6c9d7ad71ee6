"""`cayley` and `householder`: matrices with orthonormal columns from unconstrained ones; `orthogonality_error`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rom import dispatch
from rom.ops import _op, _orthogonal_cpu, _orthogonal_cuda, _orthogonal_library
from rom.reference import orthogonal as reference


def cayley(x: torch.Tensor, signs: torch.Tensor | None = None, polish: bool = False) -> torch.Tensor:
    """The Cayley map: an orthogonal matrix from any square one, or orthonormal columns from any tall one.

        A = L − Lᵀ with L = tril([x 0]);   Q = the first k columns of (I + A/2) (I − A/2)⁻¹

    as `torch.nn.utils.parametrizations.orthogonal` has it, but through one k × k inverse instead of an n × n solve:
    with x = [X₁; B] and K = I − A₁₁/2 + BᵀB/4, Q = [2K⁻¹ − I; B K⁻¹]. The gradient needs K⁻¹ and products only.

    Args:
        x: `[..., n, k]`, float32, bfloat16, float16 or float64 (complex on the reference). Tall or square; a wide x
            (n < k) gives orthonormal rows, Q(xᵀ)ᵀ. Of the leading square only the part below the diagonal is read.
        signs: `[..., min(n, k)]`, broadcast over x's batch: column j (row j of a wide Q) is negated where it is
            negative. Only the sign is read; it has no gradient. With it every Q is reachable, see `cayley_inverse`.
        polish: one Newton–Schulz step on the result, which takes the orthogonality to 1e-6 whatever ‖A‖. The
            gradient is that of the map.

    Returns:
        Q like x. 16-bit input is computed in float32 and rounded once.

    Raises:
        ValueError: x has fewer than two dimensions, or signs do not fit. TypeError: a dtype is not floating.

    Source: Lezcano-Casado and Martínez-Rubio, "Cheap Orthogonal Constraints" (2019), and for the k × k form Trockman
    and Kolter, "Orthogonalizing Convolutional Layers with the Cayley Transform" (2021), §3. Not cast by autocast.

    >>> rom.ops.cayley(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))  # A/2 = [[0, -1], [1, 0]]: a quarter turn
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    return _map("cayley", x, signs, polish)


def householder(x: torch.Tensor, signs: torch.Tensor | None = None, polish: bool = False) -> torch.Tensor:
    """A product of k Householder reflections: its first k columns.

        v_j = column j of tril(x, −1) + [I; 0];   Q = H₁ H₂ ⋯ H_k [I; 0]   with H_j = I − 2 v_j v_jᵀ / ‖v_j‖²

    All at once by the compact WY form: with V = [v_1 … v_k] and L = striu(VᵀV) + diag(VᵀV)/2, Q = [I; 0] − V L⁻¹ V₁ᵀ,
    so that both passes are matrix products. Without signs, x = 0 gives −[I; 0].

    Args, returns, raises: as `cayley`; only the part of x below the diagonal is read. No complex x.

    Source: Schreiber and Van Loan, "A storage-efficient WY representation for products of Householder transformations"
    (1989); as a parametrisation Mhammedi et al. (2017). Not cast by autocast.

    >>> rom.ops.householder(torch.tensor([[0.0], [1.0]]))  # the reflection along (1, 1), applied to (1, 0)
    tensor([[ 0.],
            [-1.]])
    """
    if isinstance(x, torch.Tensor) and x.is_complex():
        raise TypeError("rom.ops.householder: expected a real x, got a complex one. Use rom.ops.cayley.")
    return _map("householder", x, signs, polish)


def orthogonality_error(q: torch.Tensor) -> torch.Tensor:
    """max |QᵀQ − I| of every matrix (|QQᵀ − I| of a wide one): `[..., n, k]` to `[...]`.

    In float64 whatever q's dtype, so that it shows q's error and not that of the measurement. Zero for an empty Q.

    >>> rom.ops.orthogonality_error(torch.tensor([[1.0, 0.0], [0.0, 1.5]]))
    tensor(1.2500, dtype=torch.float64)
    """
    check_matrix("orthogonality_error", "q", q, complex_too=True)
    q = q.to(torch.complex128 if q.is_complex() else torch.float64)
    if q.shape[-2] < q.shape[-1]:
        q = q.mH
    gram = q.mH @ q
    difference = (gram - torch.eye(q.shape[-1], dtype=gram.dtype, device=gram.device)).abs()
    return difference.amax((-2, -1)) if difference.shape[-1] else difference.sum((-2, -1))


def check_matrix(op: str, name: str, x: torch.Tensor, complex_too: bool = False) -> None:
    """`x` must be a floating matrix or a batch of them."""
    _op.check_tensors(op, name, **{name: x})
    if not (complex_too and x.is_complex()):
        _op.check_floating(op, name, x)
    if x.dim() < 2:
        _op.fail(op, f"{name} of shape [..., n, k]", str(_op.shape(x)))


def check_signs(op: str, signs: torch.Tensor | None, x: torch.Tensor) -> None:
    """`signs` must be broadcastable to one number per column (per row, if x is wide) of each matrix of x."""
    if signs is None:
        return
    _op.check_tensors(op, "x", x=x, signs=signs)
    expected = (*x.shape[:-2], min(x.shape[-2:]))
    fits = 0 < signs.dim() <= len(expected) and signs.shape[-1] == expected[-1]
    if not fits or any(s not in (1, e) for s, e in zip(signs.shape[::-1], expected[::-1])):
        _op.fail(op, f"signs of shape {tuple(expected)} or broadcastable to it", str(_op.shape(signs)))


def _map(op: str, x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> torch.Tensor:
    check_matrix(op, "x", x, complex_too=op == "cayley")
    check_signs(op, signs, x)
    if x.shape[-2] < x.shape[-1]:
        return _map(op, x.mT, signs, polish).mT
    complex_refused = "complex matrices run on the reference"
    refusals = (("cpu", complex_refused), ("cuda", complex_refused)) if x.is_complex() else ()
    backend = dispatch.choose(op, x.device.type, refusals)
    if backend == "reference" and (x.is_complex() or not torch.compiler.is_compiling()):
        return _reference(op, x, signs, polish)
    batch = x.shape[:-2]
    if signs is not None:
        signs = signs.detach().expand(*batch, x.shape[-1]).reshape(batch.numel(), x.shape[-1])
    run = _FORWARD[op]
    if x.dim() == 3:  # views would be nodes of the graph: 40 us in a call of 250 for a small batch
        return run(x, signs, polish, backend)[0]
    return run(x.reshape(batch.numel(), *x.shape[-2:]), signs, polish, backend)[0].view(x.shape)


def _reference(op: str, x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> torch.Tensor:
    compute = x.dtype if x.is_complex() else _op.compute_dtype(x.dtype)
    with _op.without_autocast(x.device.type):
        q = getattr(reference, op)(x.to(compute))
        if signs is not None:
            q = q * _orthogonal_library.factors(signs, q)
        if polish:  # the value of the polished matrix, the gradient of the map
            q = q + (reference.polish(q) - q).detach()
        return q.to(x.dtype)


# ------------------------------------------------------------------------------------------------ registration
# Per map: forward to (Q, what the gradient needs besides x; empty, of one dimension, if that is Q), backward to x's
# gradient. x is `[batch, n, k]`, n >= k.
for _name in ("cayley", "householder"):
    for _backend, _module in (
        ("cuda", _orthogonal_cuda),
        ("cpu", _orthogonal_cpu),
        ("reference", _orthogonal_library),
    ):
        dispatch.register(
            _name,
            _backend,
            getattr(_module, f"{_name}_forward"),
            getattr(_module, f"{_name}_backward"),
            kernels=(f"{_name}_forward", f"{_name}_backward") if _backend != "reference" else (),
            shared_bytes=_orthogonal_cuda.SHARED_BYTES if _backend == "cuda" else 0,
        )


def second_order(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of function(*inputs) as plain torch operations, which can be differentiated again."""
    with torch.enable_grad():
        # aliases, so that a gradient stops here, yet what is computed from it goes on into the caller's graph
        inputs = tuple(x.view_as(x) for x in inputs)
        return torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)


# The registered operators by name: a look-up in torch.ops and the choice of an overload take 10 us.
_FORWARD: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}
_BACKWARD: dict[str, Callable[..., torch.Tensor]] = {}


def _register(op: str) -> None:
    _op.define(f"{op}(Tensor x, Tensor? signs, bool polish, str backend) -> (Tensor, Tensor)")
    _op.define(f"{op}_backward(Tensor grad, Tensor x, Tensor? signs, Tensor saved, str backend) -> Tensor")

    def forward(
        x: torch.Tensor, signs: torch.Tensor | None, polish: bool, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _op.without_autocast(x.device.type):
            return dispatch.implementation(op, backend).forward(x, signs, polish)

    def backward(
        grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, saved: torch.Tensor, backend: str
    ) -> torch.Tensor:
        run = dispatch.implementation(op, backend).backward
        assert run is not None
        with _op.without_autocast(x.device.type):
            return run(grad, x, signs, saved)

    def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, signs, _, ctx.backend = inputs
        q, saved = output
        ctx.save_for_backward(x, signs, q if saved.dim() == 1 else saved)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)  # no zeros for it

    def autograd(ctx, grad, _):  # type: ignore[no-untyped-def]
        x, signs, saved = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # a second derivative is wanted
            (grad_x,) = second_order(lambda x: _reference(op, x, signs, False), (x,), grad)
        else:
            grad_x = _BACKWARD[op](grad, x, signs, saved, ctx.backend)
        return grad_x, None, None, None

    def fake(x, signs, polish, backend):  # type: ignore[no-untyped-def]
        batch, n, k = x.shape
        compute = _op.compute_dtype(x.dtype)
        native = backend == "cpu"
        shape = _orthogonal_cpu.saved_shape(op, batch, n, k, x.dtype == compute) if native else (batch, k, k)
        return x.new_empty(x.shape), x.new_empty(shape, dtype=compute)

    def fake_backward(grad, x, signs, saved, backend):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape)

    _op.LIBRARY.impl(op, forward, "CompositeExplicitAutograd")
    _op.LIBRARY.impl(f"{op}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rom::{op}", fake)
    torch.library.register_fake(f"rom::{op}_backward", fake_backward)
    torch.library.register_autograd(f"rom::{op}", autograd, setup_context=setup)
    _FORWARD[op] = getattr(torch.ops.rom, op).default
    _BACKWARD[op] = getattr(torch.ops.rom, f"{op}_backward").default


for _name in ("cayley", "householder"):
    _register(_name)
