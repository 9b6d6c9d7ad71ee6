"""The orthogonal maps on a GPU: native kernels up to 128 columns, library routines and tensor cores above."""

from __future__ import annotations

from functools import cache, partial

import torch

from rom import native
from rom.ops import _op
from rom.ops import _orthogonal_library as library

# Shared memory per block of the largest launch: up to 64 columns, and up to 128.
SHARED_BYTES, SHARED_BYTES_128 = 101376, 168960


@cache
def _most_columns(device: torch.device, dtype: torch.dtype) -> int:
    if dtype == torch.float64:
        return 64
    gpu = torch.cuda.get_device_properties(device)
    return 128 if getattr(gpu, "shared_memory_per_block_optin", SHARED_BYTES_128) >= SHARED_BYTES_128 else 64


def fits(x: torch.Tensor) -> bool:
    """Whether the native kernels take matrices of this shape and dtype."""
    return x.shape[-1] <= 64 or x.shape[-1] <= _most_columns(x.device, x.dtype)


def _native(kernel: str, x: torch.Tensor, signs: torch.Tensor | None, **tensors: torch.Tensor) -> None:
    if x.numel() == 0:
        return
    if signs is not None and signs.dtype not in (x.dtype, _op.compute_dtype(x.dtype)):
        signs = library.factors(signs, x).squeeze(-2)
    arguments = {"x": x, "signs": _op.unit_stride(signs), **tensors}
    # the square Cayley map needs no workspace below 65 columns, and asking takes as long as a small launch
    small = kernel.startswith("cayley") and x.shape[1] == x.shape[2] <= 64
    workspace = None if small else native.workspace(kernel, x.device, **arguments)
    native.call(kernel, x.device, workspace=workspace, **arguments)


def _forward(name: str, x: torch.Tensor, signs: torch.Tensor | None, polish: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, what the kernel inverted)."""
    if not fits(x):
        return _large_forward(name, x, signs, polish)
    (batch, _, k), compute = x.shape, _op.compute_dtype(x.dtype)
    q = native.empty(x.shape, compute if polish else x.dtype, x.device)
    inverse = native.empty((batch, k, k), compute, x.device)
    _native(f"{name}_forward", x.contiguous(), signs, q=q, inverse=inverse)
    return (library.polished(q).to(x.dtype) if polish else q), inverse


def _backward(
    name: str, grad: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None, saved: torch.Tensor
) -> torch.Tensor:
    """`saved` is what the kernel inverted, or what the library's forward saved."""
    if not fits(x):
        with library.matmul_precision(x, "ieee"):
            return getattr(library, f"{name}_backward")(grad, x, signs, saved)
    grad_x = native.empty(x.shape, x.dtype, x.device)
    _native(f"{name}_backward", x.contiguous(), signs, grad=grad.contiguous(), inverse=saved, grad_x=grad_x)
    return grad_x


cayley_forward, cayley_backward = partial(_forward, "cayley"), partial(_backward, "cayley")
householder_forward, householder_backward = partial(_forward, "householder"), partial(_backward, "householder")


# ------------------------------------------------------------------------------------------------ above 128 columns
def _large_forward(
    name: str, x: torch.Tensor, signs: torch.Tensor | None, polish: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with library.matmul_precision(x, "ieee"):
        if name == "householder":
            return library.householder_forward(x, signs, polish)
        return library.cayley_forward(x, signs, polish, inverse_of=accretive_inverse)


# Twice as many digits per step: from 1 - 2 / (1 + bound) down to what TF32 can hold, 1e-3, takes log2(3.5 (1 + bound))
# steps. Above this bound of the squared norm TF32's rounding is as large as the smallest eigenvalue of M M^T.
MOST_SQUARED = 256.0


def accretive_inverse(m: torch.Tensor) -> torch.Tensor:
    """The inverse of M `[batch, k, k]` whose symmetric part is at least I, in float32 by Newton–Schulz iterations.

    X ← X (2 I − M X), from X = 2 Mᵀ / (1 + ‖M Mᵀ‖∞), is products alone: in TF32 until the residual is TF32's, then once
    with the residual in float32. It costs one look at the norm from the host; where that is forbidden (a CUDA graph is
    being captured), the norm is large or the type is float64, it is LU. Source: Schulz (1933); Pan and Reif (1985).
    """
    if m.dtype == torch.float64 or (m.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.linalg.inv_ex(m)[0]
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    with library.matmul_precision(m, "tf32"):
        gram = m @ m.mT
        bound = torch.linalg.matrix_norm(gram, float("inf"), keepdim=True)
        largest = bound.max().item()
        if not largest <= MOST_SQUARED:  # or NaN
            return torch.linalg.inv_ex(m)[0]
        scale = 2 / (1 + bound)
        x = scale * (2 * m.mT - scale * (m.mT @ gram))  # the first step
        for _ in range(steps(largest)):
            x = torch.baddbmm(x, x, m @ x, beta=2, alpha=-1)
    with library.matmul_precision(m, "ieee"):
        residual = torch.baddbmm(eye, m, x, alpha=-1)
    with library.matmul_precision(m, "tf32"):
        return torch.baddbmm(x, x, residual)


def steps(bound: float) -> int:
    """Steps after the first one until the residual is below 1e-3, for ‖M Mᵀ‖ ≤ bound."""
    residual, count = (1 - 2 / (1 + bound)) ** 2, 0
    while residual > 1e-3:
        residual, count = residual**2, count + 1
    return count
