"""add + RMSNorm, forward and backward: one program per row, or per run of rows backward.

A row is one tile of BLOCK ≥ dim values in registers, so it is read once. The host functions take what the native
kernels of the same names take (csrc/include/rom/norm.h): 2-D tensors with unit stride in the last dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_DIM = 65536  # 128 values in each of 512 threads; wider rows go to another backend
ROWS_PER_PROGRAM = 16  # as in csrc/cuda/norm.cu: a line of grad_weight costs 1/16 of the rows' own traffic
MAX_LINES = 2048


@triton.jit
def forward_kernel(
    x, residual, weight, out, total, rstd,
    dim, x_stride, residual_stride, out_stride, total_stride,
    EPS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out = s · rstd · weight with s = x + residual; stores s where `total` is given, and rstd."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < dim
    s = tl.load(x + r * x_stride + i, mask=inside, other=0.0).to(COMPUTE)
    if residual is not None:
        s += tl.load(residual + r * residual_stride + i, mask=inside, other=0.0).to(COMPUTE)
    if total is not None:
        tl.store(total + r * total_stride + i, s.to(total.dtype.element_ty), mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(s * s, 0) / dim + EPS)
    tl.store(rstd + r, inverse)
    scale = tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + r * out_stride + i, (s * inverse * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    total, weight, rstd, grad_out, grad_sum, grad_x, grad_residual, lines,
    rows, dim, rows_per_program, total_stride, grad_out_stride, grad_sum_stride, grad_x_stride, grad_residual_stride,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """With xhat = s · rstd and g = grad_out · weight: grad_s += rstd · (g − xhat · mean(g · xhat))."""
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < dim
    scale = tl.load(weight + i, mask=inside, other=0.0)
    line = tl.zeros([BLOCK], COMPUTE)
    begin = program * rows_per_program
    for r in range(begin, tl.minimum(begin + rows_per_program, rows)):
        inverse = tl.load(rstd + r)
        xhat = tl.load(total + r * total_stride + i, mask=inside, other=0.0).to(COMPUTE) * inverse
        g = tl.load(grad_out + r * grad_out_stride + i, mask=inside, other=0.0).to(COMPUTE)
        line += g * xhat
        g *= scale
        grad = (g - xhat * (tl.sum(g * xhat, 0) / dim)) * inverse
        if grad_sum is not None:
            grad += tl.load(grad_sum + r * grad_sum_stride + i, mask=inside, other=0.0).to(COMPUTE)
        tl.store(grad_x + r * grad_x_stride + i, grad.to(grad_x.dtype.element_ty), mask=inside)
        if grad_residual is not None:
            kept = grad.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + r * grad_residual_stride + i, kept, mask=inside)
    tl.store(lines + program * dim + i, line, mask=inside)


def _tile(dim: int, dtype: torch.dtype) -> dict[str, object]:
    block = triton.next_power_of_2(max(dim, 1))
    return {
        "BLOCK": block,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": min(max(block // 512, 1), 16),  # 16 values per thread, up to a full block of 512 threads
    }


def _stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    sum: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
) -> None:
    """rom_norm_forward of csrc/include/rom/norm.h."""
    rows, dim = x.shape
    if rows > 0:
        strides = (_stride(t) for t in (x, residual, out, sum))
        tile = _tile(dim, x.dtype)
        forward_kernel[(rows,)](x, residual, weight, out, sum, rstd, dim, *strides, EPS=eps, **tile)


def _lines(rows: int) -> tuple[int, int]:
    """(number of programs, rows of each): a function of the rows only, so that every GPU gives the same bits."""
    each = max(ROWS_PER_PROGRAM, triton.cdiv(rows, MAX_LINES))
    return triton.cdiv(rows, each), each


def norm_backward_workspace(sum: torch.Tensor, rstd: torch.Tensor, **_: object) -> int:
    """Bytes of scratch memory: a line of grad_weight per program."""
    return _lines(sum.shape[0])[0] * sum.shape[1] * rstd.element_size()


def norm_backward(
    sum: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    grad_x: torch.Tensor,
    grad_residual: torch.Tensor | None,
    grad_weight: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """rom_norm_backward of csrc/include/rom/norm.h."""
    rows, dim = sum.shape
    programs, each = _lines(rows)
    lines = workspace.view(rstd.dtype).view(programs, dim)
    if rows > 0:
        strides = (_stride(t) for t in (sum, grad_out, grad_sum, grad_x, grad_residual))
        backward_kernel[(programs,)](
            sum, weight, rstd, grad_out, grad_sum, grad_x, grad_residual, lines,
            rows, dim, each, *strides, **_tile(dim, grad_out.dtype),
        )  # fmt: skip
    torch.sum(lines, 0, out=grad_weight)  # torch adds the lines in a fixed order
