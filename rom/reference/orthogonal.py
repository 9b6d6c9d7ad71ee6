"""Orthogonal maps in plain torch: what the operators mean. Matrices are tall, `[..., n, k]` with n ≥ k."""

from __future__ import annotations

import torch


def _eye(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def accretive(x: torch.Tensor) -> torch.Tensor:
    """K = I − (X₁ − X₁ᴴ)/2 + BᴴB/4 of x = [X₁; B], `[..., k, k]`: its Hermitian part is at least I, so K⁻¹ exists."""
    k = x.shape[-1]
    lower, below = x[..., :k, :].tril(), x[..., k:, :]
    return _eye(x) - (lower - lower.mH) / 2 + below.mH @ below / 4


def cayley(x: torch.Tensor) -> torch.Tensor:
    """See `rom.ops.cayley`: the first k columns of (I + A/2)(I − A/2)⁻¹, by the k × k Schur complement.

    inv_ex: K is never singular, and the check of `inv` would wait for a GPU.
    """
    inverse, _ = torch.linalg.inv_ex(accretive(x))
    return torch.cat((2 * inverse - _eye(x), x[..., x.shape[-1] :, :] @ inverse), -2)


def reflectors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, L): unit lower trapezoidal V and the upper triangle L with H₁ ⋯ H_k = I − V L⁻¹ Vᵀ (compact WY)."""
    v = x.tril(-1) + torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    gram = v.mT @ v
    return v, gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)


def householder(x: torch.Tensor) -> torch.Tensor:
    """See `rom.ops.householder`: the first k columns of H₁ ⋯ H_k."""
    v, upper = reflectors(x)
    first = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    return first - v @ torch.linalg.solve_triangular(upper, v[..., : x.shape[-1], :].mT, upper=True)


def apply_cayley(x: torch.Tensor, inp: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """Q·inp, or Qᴴ·inp: one solve with K instead of Q."""
    below, inverse_of = x[..., x.shape[-1] :, :], accretive(x)
    if transpose:
        top, rest = inp[..., : x.shape[-1], :], inp[..., x.shape[-1] :, :]
        return torch.linalg.solve_ex(inverse_of.mH, 2 * top + below.mH @ rest)[0] - top
    v, _ = torch.linalg.solve_ex(inverse_of, inp)
    return torch.cat((2 * v - inp, below @ v), -2)


def apply_householder(x: torch.Tensor, inp: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """Q·inp, or Qᵀ·inp: two thin products and a triangular solve."""
    v, upper = reflectors(x)
    k = x.shape[-1]
    if transpose:
        inner = torch.linalg.solve_triangular(upper.mT, v.mT @ inp, upper=False)
        return inp[..., :k, :] - v[..., :k, :] @ inner
    inner = torch.linalg.solve_triangular(upper, v[..., :k, :].mT @ inp, upper=True)
    return torch.nn.functional.pad(inp, (0, 0, 0, x.shape[-2] - k)) - v @ inner


def polish(q: torch.Tensor) -> torch.Tensor:
    """One Newton–Schulz step towards the nearest orthonormal matrix: an error e becomes 3/4 e²."""
    return q + q @ (_eye(q) - q.mH @ q) / 2
