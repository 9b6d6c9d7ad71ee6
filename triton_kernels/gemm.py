"""What the matrix products share: the order of the tiles, loads of tiles, and how they are launched.

A product is a persistent loop over output tiles around a loop over the contraction. Operands come through descriptors
(Hopper's TMA, which fills what lies outside with zeros) or through pointers (everything else, and gathered rows, which
TMA cannot read); wgmma reads both from shared memory alike. Accumulators and epilogues are float32, or float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

PROGRAMS_WITHOUT_GPU = 3  # of the interpreter: few, so that each has several tiles


# ------------------------------------------------------------------------------------------------ on the device
@triton.jit
def tile_position(tile, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a tile's number.

    Bands of GROUP_M row tiles are walked column by column: the tiles that run at one time share few rows of the left
    operand and few columns of the right one, and both stay in L2.
    """
    band = tile // (GROUP_M * n_tiles)
    first = band * GROUP_M
    height = tl.minimum(m_tiles - first, GROUP_M)
    inside = tile - first * n_tiles
    return first + inside % height, inside // height


@triton.jit
def load_rows(
    x, rows, inside, first_row, first_col, cols, stride,
    WIDTH: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """A [rows, WIDTH] tile of a row-major matrix; columns after `cols` are zero, with CUT rows that are not inside."""
    if TMA:
        tile = x.load([first_row, first_col])
        return tl.where(inside[:, None], tile, tl.zeros_like(tile)) if CUT else tile
    else:
        col = first_col + tl.arange(0, WIDTH)
        at = x + rows[:, None] * stride + col[None, :]
        if EVEN:
            return tl.load(at, mask=inside[:, None], other=0.0) if CUT else tl.load(at)
        else:
            here = (col < cols)[None, :]
            return tl.load(at, mask=here & inside[:, None] if CUT else here, other=0.0)


@triton.jit
def load_matrix(
    w, index, k, n, K, N, stride_index, stride_k, stride_n,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, K_FIRST: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The [BLOCK_K, BLOCK_N] tile at (k, n) of matrix `index` of a stack; zero outside of it.

    The tile is loaded as it lies in memory, K_FIRST or not: wgmma reads shared memory either way. The descriptor has
    three dimensions, so that what lies behind one matrix is zero and not the next matrix.
    """
    if TMA:
        if K_FIRST:
            return w.load([index, k, n]).reshape(BLOCK_K, BLOCK_N)
        else:
            return w.load([index, n, k]).reshape(BLOCK_N, BLOCK_K).T
    else:
        row, col = k + tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
        at = w + tl.cast(index, tl.int64) * stride_index + row[:, None] * stride_k + col[None, :] * stride_n
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(row < K)[:, None] & (col < N)[None, :], other=0.0)


# ------------------------------------------------------------------------------------------------ on the host
def programs(device: torch.device, per_sm: int) -> int:
    """Programs that run at one time."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count * per_sm


def takes_tma(*tensors: torch.Tensor) -> bool:
    """Hopper or newer, unit stride in the last dimension, bases and other strides multiples of 16 bytes."""
    return all(
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def descriptor(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """A tensor to be read in blocks by TMA."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def precision(tensor: torch.Tensor) -> str:
    """How float32 products are formed: exactly, unless torch's own switch allows TF32."""
    return "tf32" if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def compute(tensor: torch.Tensor) -> tl.dtype:
    """The type of sums: float32, or float64 for float64."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
