"""The orthogonal maps on the CPU: the native kernels where they win, library routines elsewhere."""

from __future__ import annotations

import torch

from rom import native
from rom.ops import _op
from rom.ops import _orthogonal_library as library
from rom.reference import orthogonal as reference


def fits(n: int, k: int) -> bool:
    """Whether the native kernels take n × k matrices: up to 4 MB, which the last cache holds several of."""
    return n * k <= 1048576


def _native(kernel: str, x: torch.Tensor, signs: torch.Tensor | None, **tensors: torch.Tensor) -> None:
    if x.numel() == 0:
        return
    arguments = {"x": x, "signs": None if signs is None else library.factors(signs, x).squeeze(-2), **tensors}
    workspace = native.workspace(kernel, x.device, **arguments)
    native.call(kernel, x.device, workspace=workspace, **arguments)


def _backward(
    name: str, grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, **saved: torch.Tensor
) -> torch.Tensor:
    compute = _op.compute_dtype(x.dtype)
    grad_x = native.empty(x.shape, compute, x.device)
    grad, work = grad.to(compute).contiguous(), x.to(compute).contiguous()
    _native(f"{name}_backward", work, signs, grad=grad, grad_x=grad_x, **saved)
    return grad_x.to(x.dtype)


def cayley_forward(x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, nothing): its gradient needs Q alone, in full precision."""
    if not fits(*x.shape[1:]):
        return library.cayley_forward(x, signs, polish)
    work = x.to(_op.compute_dtype(x.dtype)).contiguous()
    q = native.empty(work.shape, work.dtype, x.device)
    _native("cayley_forward", work, signs, q=q)
    q = reference.polish(q) if polish else q
    return (q, q.new_empty(0)) if x.dtype == q.dtype else (q.to(x.dtype), q)


def cayley_backward(
    grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, saved: torch.Tensor
) -> torch.Tensor:
    """`saved` is Q, or what the library's forward saved."""
    if not fits(*x.shape[1:]):
        return library.cayley_backward(grad, x, signs, saved)
    return _backward("cayley", grad, x, signs, q=saved)


def householder_forward(x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, L⁻¹)."""
    batch, n, k = x.shape
    if not fits(n, k):
        return library.householder_forward(x, signs, polish)
    work = x.to(_op.compute_dtype(x.dtype)).contiguous()
    q = native.empty(work.shape, work.dtype, x.device)
    inverse = native.empty((batch, k, k), work.dtype, x.device)
    _native("householder_forward", work, signs, q=q, inverse=inverse)
    return (reference.polish(q) if polish else q).to(x.dtype), inverse


def householder_backward(
    grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, saved: torch.Tensor
) -> torch.Tensor:
    """`saved` is L⁻¹, or what the library's forward saved."""
    if not fits(*x.shape[1:]):
        return library.householder_backward(grad, x, signs, saved)
    return _backward("householder", grad, x, signs, inverse=saved)


def saved_shape(name: str, batch: int, n: int, k: int, same_dtype: bool) -> tuple[int, ...]:
    """The shape of a forward pass's second result; `same_dtype`: x has the dtype it computes in."""
    if name == "cayley" and fits(n, k):
        return (0,) if same_dtype else (batch, n, k)
    return batch, k, k
