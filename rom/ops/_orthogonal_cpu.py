"""The orthogonal maps on the CPU: the native kernels where they win, library routines elsewhere."""

from __future__ import annotations

from functools import partial

import torch

from rom import native
from rom.ops import _op
from rom.ops import _orthogonal_library as library
from rom.reference import orthogonal as reference


def fits(n: int, k: int) -> bool:
    """Whether the native kernels take n × k matrices. They run one matrix on one thread, in its core's cache."""
    return k <= 128 and n * k <= 262144


def _native(kernel: str, x: torch.Tensor, signs: torch.Tensor | None, **tensors: torch.Tensor) -> None:
    arguments = {"x": x, "signs": None if signs is None else library.factors(signs, x).squeeze(-2), **tensors}
    workspace = native.workspace(kernel, x.device, **arguments)
    native.call(kernel, x.device, workspace=workspace, **arguments)


def _forward(name: str, x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, k = x.shape
    if not fits(n, k) or x.numel() == 0:
        return getattr(library, f"{name}_forward")(x, signs, polish)
    work = x.to(_op.compute_dtype(x.dtype)).contiguous()
    q = native.empty(work.shape, work.dtype, x.device)
    inverse = native.empty((batch, k, k), work.dtype, x.device)
    _native(f"{name}_forward", work, signs, q=q, inverse=inverse)
    return (reference.polish(q) if polish else q).to(x.dtype), inverse


def _backward(
    name: str, grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, inverse: torch.Tensor
) -> torch.Tensor:
    if not fits(*x.shape[1:]) or x.numel() == 0:
        return getattr(library, f"{name}_backward")(grad, x, signs, inverse)
    compute = _op.compute_dtype(x.dtype)
    grad_x = native.empty(x.shape, compute, x.device)
    grad, work = grad.to(compute).contiguous(), x.to(compute).contiguous()
    _native(f"{name}_backward", work, signs, grad=grad, inverse=inverse, grad_x=grad_x)
    return grad_x.to(x.dtype)


cayley_forward, cayley_backward = partial(_forward, "cayley"), partial(_backward, "cayley")
householder_forward, householder_backward = partial(_forward, "householder"), partial(_backward, "householder")
