"""The orthogonal maps and their gradients by library routines: matrix products, one inverse or triangular solve.

Formulas in the notation of `rom.ops.cayley` and `householder`; G is the gradient of Q. All functions take
`[batch, n, k]` with n >= k and compute in float32, or in float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rom.ops import _op
from rom.reference import orthogonal as reference


def factors(signs: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """±1 per column of q, from the sign of `signs` alone: averages and weight decay cannot wear them out."""
    return torch.where(signs < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


@contextmanager
def matmul_precision(like: torch.Tensor, precision: str) -> Iterator[None]:
    """Products of float32 matrices on a GPU in "ieee" or "tf32", whatever the user allows; nothing else changes.

    TF32 keeps 10 bits: a Q computed in it is orthogonal to 1e-3. It serves where the factor that is rounded is small.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if not like.is_cuda or before == precision:
        yield
        return
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def polished(q: torch.Tensor) -> torch.Tensor:
    """`reference.polish` on tensor cores: only the residual needs float32."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    with matmul_precision(q, "ieee"):
        residual = torch.baddbmm(eye, q.mT, q, alpha=-1)
    with matmul_precision(q, "tf32"):
        return torch.baddbmm(q, q, residual, alpha=0.5)


def _lu_inverse(m: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv_ex(m)[0]  # not inv, whose check would wait for a GPU


def _compute(x: torch.Tensor) -> torch.Tensor:
    return x.to(_op.compute_dtype(x.dtype))


def _finish(q: torch.Tensor, signs: torch.Tensor | None, polish: bool, dtype: torch.dtype) -> torch.Tensor:
    if signs is not None:
        q *= factors(signs, q)
    return (polished(q) if polish else q).to(dtype)


def _gradient(grad: torch.Tensor, signs: torch.Tensor | None) -> torch.Tensor:
    """The gradient before the signs were applied, in the compute type."""
    grad = _compute(grad)
    return grad if signs is None else grad * factors(signs, grad)


def cayley_forward(
    x: torch.Tensor,
    signs: torch.Tensor | None,
    polish: bool,
    inverse_of: Callable[[torch.Tensor], torch.Tensor] = _lu_inverse,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, R = K⁻¹)."""
    work, k = _compute(x), x.shape[-1]
    inverse = inverse_of(reference.accretive(work))
    q = torch.empty_like(work, memory_format=torch.contiguous_format)
    torch.mul(inverse, 2, out=q[:, :k])
    q[:, :k].diagonal(dim1=-2, dim2=-1).sub_(1)
    if k < x.shape[-2]:
        torch.bmm(work[:, k:], inverse, out=q[:, k:])
    return _finish(q, signs, polish, x.dtype), inverse.contiguous()


def cayley_backward(
    grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, inverse: torch.Tensor
) -> torch.Tensor:
    """R̄ = 2G₁ + BᵀG₂;  K̄ = −Rᵀ R̄ Rᵀ;  X̄₁ = tril(−(K̄ − K̄ᵀ)/2, −1);  B̄ = G₂Rᵀ + B (K̄ + K̄ᵀ)/4."""
    g, work, k = _gradient(grad, signs), _compute(x), x.shape[-1]
    top, below, b = g[:, :k], g[:, k:], work[:, k:]
    grad_inverse = torch.baddbmm(top, b.mT, below, beta=2) if b.shape[1] else top * 2
    grad_k = inverse.mT @ grad_inverse @ inverse.mT  # −K̄
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    torch.sub(grad_k, grad_k.mT, out=out[:, :k]).mul_(0.5).tril_(-1)
    if b.shape[1]:
        torch.bmm(below, inverse.mT, out=out[:, k:])
        out[:, k:].baddbmm_(b, grad_k + grad_k.mT, alpha=-0.25)
    return out.to(x.dtype)


def householder_forward(x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, L)."""
    work, k = _compute(x), x.shape[-1]
    v, upper = reference.reflectors(work)
    q = torch.bmm(v, torch.linalg.solve_triangular(upper, v[:, :k].mT, upper=True)).neg_()
    q[:, :k].diagonal(dim1=-2, dim2=-1).add_(1)
    return _finish(q, signs, polish, x.dtype), upper.contiguous()


def householder_backward(
    grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, upper: torch.Tensor
) -> torch.Tensor:
    """Z = L⁻¹ V₁ᵀ;  C = −L⁻ᵀ VᵀG;  L̄ = −C Zᵀ;  V̄ = −G Zᵀ + V (striu L̄ + (striu L̄)ᵀ + diag L̄), and V̄₁ += Cᵀ."""
    g, k = _gradient(grad, signs), x.shape[-1]
    v = _compute(x).tril(-1)
    v.diagonal(dim1=-2, dim2=-1).fill_(1)
    z = torch.linalg.solve_triangular(upper, v[:, :k].mT, upper=True)
    c = torch.linalg.solve_triangular(upper.mT, v.mT @ g, upper=False)  # −C
    lower = (c @ z.mT).triu_()  # L̄
    symmetric = lower + lower.triu(1).mT
    out = torch.baddbmm(v @ symmetric, g, z.mT, alpha=-1)
    out[:, :k] -= c.mT
    return out.tril_(-1).to(x.dtype)
