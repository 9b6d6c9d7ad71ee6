"""`cayley_inverse` and `householder_inverse`: the parameters of a given orthogonal matrix."""

from __future__ import annotations

import torch

from rom.ops.orthogonal import check_matrix

PANEL = 64  # columns eliminated one by one before the rest is updated by a product


def cayley_inverse(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x, signs)` with `cayley(x, signs) = q`, for any q of orthonormal columns (rows, if it is wide).

    The Cayley map alone misses every matrix with an eigenvalue −1. With the signs d of a no-pivot LU decomposition of
    Q₁ + diag(d), which keep every pivot at 1 or more, Q diag(d) is far from those, and with Q_d = Q diag(d)

        K = 2 (I + Q_d1)⁻¹,   B = Q_d2 K,   A₁₁ = Kᵀ − K.

    Args:
        q: `[..., n, k]`, float32, bfloat16, float16 or float64, orthonormal up to its rounding. Not differentiable.

    Returns:
        x `[..., n, k]` in q's dtype, signs `[..., min(n, k)]` of ±1 in q's dtype. Computed in float64; for float32 the
        round trip is good to 1e-5.

    Raises:
        ValueError: q has fewer than two dimensions. TypeError: its dtype is not floating.

    >>> x, signs = rom.ops.cayley_inverse(-torch.eye(2))
    >>> signs, torch.dist(rom.ops.cayley(x, signs), -torch.eye(2))
    (tensor([-1., -1.]), tensor(0.))
    """
    check_matrix("cayley_inverse", "q", q)
    with torch.no_grad():
        tall, k = _tall(q), min(q.shape[-2:])
        _, signs = _signed_lu(tall[..., :k, :])
        tall = tall * signs.unsqueeze(-2)
        eye = torch.eye(k, dtype=tall.dtype, device=q.device)
        kernel = 2 * torch.linalg.inv(eye + tall[..., :k, :])
        x = torch.cat(((kernel.mT - kernel).tril(-1), tall[..., k:, :] @ kernel), -2)
        return _like(x, q), signs.to(q.dtype)


def householder_inverse(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x, signs)` with `householder(x, signs) = q`, for any q of orthonormal columns (rows, if it is wide).

    The vectors V are the factor of Q + [diag(d); 0] = V U, an LU decomposition whose signs d keep every pivot at 1 or
    more; Q = H(V) diag(−d). Args, returns, raises: as `cayley_inverse`.

    Source: Ballard et al., "Reconstructing Householder Vectors from Tall-Skinny QR" (2014).

    >>> x, signs = rom.ops.householder_inverse(torch.eye(3, 2))
    >>> x.abs().sum(), signs
    (tensor(0.), tensor([-1., -1.]))
    """
    check_matrix("householder_inverse", "q", q)
    with torch.no_grad():
        tall, k = _tall(q), min(q.shape[-2:])
        lu, signs = _signed_lu(tall[..., :k, :])
        below = torch.linalg.solve_triangular(lu.triu(), tall[..., k:, :], upper=True, left=False)
        return _like(torch.cat((lu.tril(-1), below), -2), q), -signs.to(q.dtype)


def _tall(q: torch.Tensor) -> torch.Tensor:
    return (q.mT if q.shape[-2] < q.shape[-1] else q).double()


def _like(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (x.mT if q.shape[-2] < q.shape[-1] else x).to(q.dtype).contiguous()


def _signed_lu(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(LU factors in one matrix, d) of square + diag(d), where d_j is the sign of the j-th pivot without it."""
    lu, k = square.clone(), square.shape[-1]
    signs = square.new_ones(square.shape[:-1])
    for start in range(0, k, PANEL):
        end = min(start + PANEL, k)
        for j in range(start, end):
            signs[..., j] = torch.where(lu[..., j, j] < 0, -1.0, 1.0)
            lu[..., j, j] += signs[..., j]
            lu[..., j + 1 :, j] /= lu[..., j, j, None]
            lu[..., j + 1 :, j + 1 : end] -= lu[..., j + 1 :, j, None] * lu[..., j, None, j + 1 : end]
        panel = lu[..., start:end, start:end]
        lu[..., start:end, end:] = torch.linalg.solve_triangular(
            panel, lu[..., start:end, end:], upper=False, unitriangular=True
        )
        lu[..., end:, end:] -= lu[..., end:, start:end] @ lu[..., start:end, end:]
    return lu, signs
