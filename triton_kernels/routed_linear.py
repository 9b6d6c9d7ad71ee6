"""Matrix products over the rows of each expert: forward, gradient of the input, gradient of the weight.

Rows in expert order are cut into segments by `offsets` on the device: expert e has rows offsets[e] … offsets[e + 1].

    product       y_r = x_r W_eᵀ (+ b_e)    and with dy for x and W_e instead of its transpose the input's gradient
    weight_grad   dW_e = Σ dy_rᵀ x_r over its rows, in their order; zeros for an expert without rows

A row is read and written in its place, or where its slot is (`perm`): a gathered row of slot s is token s // TOP_K, a
scattered one goes to row s. Weights of rows multiply the accumulator, before the only rounding. How many tiles an
expert has is known on the device only, so a program takes every P-th tile and walks over the experts as the tile's
number grows: no synchronisation with the host, no padding, no atomics, and the contraction is never split, so that
results are the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import gemm
from .gemm import load_matrix, load_rows, tile_position


def _shape(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# Starting points that no GPU has judged yet. An indirect load in the pipelined loop splits the stages, hence five where
# rows are gathered. BLOCK_M counts rows, BLOCK_N and BLOCK_K columns of the weight's gradient or of the two operands.
TILES = {
    "product": _shape(128, 256, 64, 8, 3),
    "product, few rows": _shape(64, 128, 128, 4, 4),
    "product, dots": _shape(128, 128, 64, 8, 4),  # the partner's tile has to fit in registers beside the sums
    "product, pointers": _shape(128, 128, 32, 8, 4),
    "product, float32": _shape(64, 64, 32, 4, 3),
    "product, float64": _shape(32, 32, 16, 4, 3),
    "weight_grad": _shape(64, 128, 256, 8, 3),
    "weight_grad, gathered": _shape(64, 128, 256, 8, 5),
    "weight_grad, pointers": _shape(32, 128, 128, 8, 4),
    "weight_grad, float32": _shape(32, 64, 64, 4, 3),
    "weight_grad, float64": _shape(16, 32, 32, 4, 3),
}
FEW_ROWS = 64  # per expert: wgmma's own number of rows
GROUP_M = 8
ROW_BLOCK, COLUMN_BLOCK = 16, 128  # of the kernels that are not products


# ------------------------------------------------------------------------------------------------ pieces
@triton.jit
def count_tiles(offsets, experts, BLOCK_M: tl.constexpr):
    """Row tiles of all experts."""
    total, begin = 0, tl.load(offsets)
    for expert in range(experts):
        end = tl.load(offsets + expert + 1)
        total += tl.cdiv(end - begin, BLOCK_M)
        begin = end
    return total


@triton.jit
def walk(tile, offsets, expert, begin, end, first, m_tiles, n_tiles, BLOCK_M: tl.constexpr):
    """On to the expert that owns `tile`; `first` is the number of its first tile. Scalars only: a search with vectors
    would put a barrier in front of every tile."""
    while tile >= first + m_tiles * n_tiles:
        first += m_tiles * n_tiles
        expert += 1
        begin = end
        end = tl.load(offsets + expert + 1)
        m_tiles = tl.cdiv(end - begin, BLOCK_M)
    return expert, begin, end, first, m_tiles


@triton.jit
def source_rows(perm, row, last, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """Where rows are read. Rows behind the segment repeat its last one, so that no load needs a mask."""
    row = tl.minimum(row, last)
    if GATHER:
        row = tl.load(perm + row) // TOP_K
    return row.to(tl.int64)


# ------------------------------------------------------------------------------------------------ products
@triton.jit
def product_kernel(
    x, w, out, offsets, perm, row_weight, bias, partner, dots,
    experts, rows, N, K, stride_x, stride_e, stride_k, stride_n, stride_out, stride_partner,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, GATHER_PARTNER: tl.constexpr,
    K_FIRST: tl.constexpr, TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out_r = x_r times the [K, N] matrix of its expert. `w`, and x unless gathered, are descriptors with TMA.

    With `partner` dots[column tile, r] is the product of row r, before its weight, with the partner's over the tile.
    """
    tl.assume(K > 0)  # or the melted loops carry a second epilogue
    n_tiles = tl.cdiv(N, BLOCK_N)
    total = count_tiles(offsets, experts, BLOCK_M) * n_tiles
    expert, begin, end, first, m_tiles = -1, 0, tl.load(offsets), 0, 0  # in front of the first one
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, begin, end, first, m_tiles = walk(tile, offsets, expert, begin, end, first, m_tiles, n_tiles, BLOCK_M)
        tile_m, tile_n = tile_position(tile - first, m_tiles, n_tiles, GROUP_M)
        m, n = begin + tile_m * BLOCK_M, tile_n * BLOCK_N
        row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        inside = row < end
        source = source_rows(perm, row, end - 1, TOP_K, GATHER)
        sums = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        for k in range(0, K, BLOCK_K):
            # A row of the result depends on its own row only, so those behind the segment need not be zero.
            a = load_rows(x, source, inside, m, k, K, stride_x, BLOCK_K, TMA and not GATHER, EVEN_K, False)
            b = load_matrix(
                w, expert, k, n, K, N, stride_e, stride_k, stride_n, BLOCK_K, BLOCK_N, K_FIRST, TMA, EVEN_N and EVEN_K
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=COMPUTE)
        if bias is not None:
            sums += tl.load(bias + expert * N + col, mask=col < N, other=0.0).to(COMPUTE)[None, :]
        if partner is not None:
            other = source_rows(perm, row, end - 1, TOP_K, GATHER_PARTNER)
            p = load_rows(partner, other, inside, m, n, N, stride_partner, BLOCK_N, False, EVEN_N, False)
            tl.store(dots + tile_n * rows + row, tl.sum(sums * p.to(COMPUTE), 1), mask=inside)
        target = tl.minimum(row, end - 1)
        if SCATTER or row_weight is not None:
            slot = tl.load(perm + target)
            if row_weight is not None:
                sums *= tl.load(row_weight + slot)[:, None]
            if SCATTER:
                target = slot
        here = inside[:, None]
        if not EVEN_N:
            here = here & (col < N)[None, :]
        at = out + target.to(tl.int64)[:, None] * stride_out + col[None, :]
        tl.store(at, sums.to(out.dtype.element_ty), mask=here)


@triton.jit
def weight_step(
    sums, column_sums, dy, x, perm, row_weight, m, end, n, k, N, K, stride_dy, stride_x,
    TOP_K: tl.constexpr, GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """sums += dy[m : m + BLOCK_M]ᵀ x[m : m + BLOCK_M]. Both are zero behind the segment (CUT): zero times a
    neighbour's infinity would not be."""
    row = m + tl.arange(0, BLOCK_M)
    inside = row < end
    at_dy = source_rows(perm, row, end - 1, TOP_K, GATHER_DY)
    at_x = source_rows(perm, row, end - 1, TOP_K, GATHER_X)
    a = load_rows(dy, at_dy, inside, m, n, N, stride_dy, BLOCK_N, TMA and not GATHER_DY, EVEN_N, CUT)
    b = load_rows(x, at_x, inside, m, k, K, stride_x, BLOCK_K, TMA and not GATHER_X, EVEN_K, CUT)
    if row_weight is not None:
        weight = tl.load(row_weight + tl.load(perm + tl.minimum(row, end - 1)))
        a = (a.to(COMPUTE) * weight[:, None]).to(a.dtype)
    if BIAS:
        column_sums += tl.sum(a.to(COMPUTE), 0)
    return tl.dot(a.T, b, sums, input_precision=PRECISION, out_dtype=COMPUTE), column_sums


@triton.jit
def weight_grad_kernel(
    dy, x, dw, db, offsets, perm, row_weight,
    experts, N, K, stride_dy, stride_x, stride_e, stride_n,
    TOP_K: tl.constexpr, GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, TMA: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dw [experts, N, K], and db [experts, N] if given: a program adds all rows of an expert for one tile, in order.

    The tiles of an expert lie next to each other: its rows come from memory once, then from L2.
    """
    BIAS: tl.constexpr = db is not None
    n_tiles, k_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tiles = n_tiles * k_tiles
    for tile in range(tl.program_id(0), experts * tiles, tl.num_programs(0)):
        expert = tile // tiles
        begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        tile_n, tile_k = tile_position(tile % tiles, n_tiles, k_tiles, GROUP_M)
        n, k = tile_n * BLOCK_N, tile_k * BLOCK_K
        sums, column_sums = tl.zeros([BLOCK_N, BLOCK_K], COMPUTE), tl.zeros([BLOCK_N], COMPUTE)
        # cp.async fills rows that are not there with zeros for nothing. A tile of TMA has to go through registers for
        # it, so the cut step stands outside of the loop, and before it: the pipeline then has its registers.
        if TMA:
            whole = begin + (end - begin) // BLOCK_M * BLOCK_M
            if whole < end:
                sums, column_sums = weight_step(
                    sums, column_sums, dy, x, perm, row_weight, whole, end, n, k, N, K, stride_dy, stride_x,
                    TOP_K, GATHER_DY, GATHER_X, BIAS, TMA, EVEN_N, EVEN_K, True, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION, COMPUTE,
                )  # fmt: skip
            for m in range(begin, whole, BLOCK_M):
                sums, column_sums = weight_step(
                    sums, column_sums, dy, x, perm, row_weight, m, end, n, k, N, K, stride_dy, stride_x,
                    TOP_K, GATHER_DY, GATHER_X, BIAS, TMA, EVEN_N, EVEN_K, False, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION, COMPUTE,
                )  # fmt: skip
        else:
            for m in range(begin, end, BLOCK_M):
                sums, column_sums = weight_step(
                    sums, column_sums, dy, x, perm, row_weight, m, end, n, k, N, K, stride_dy, stride_x,
                    TOP_K, GATHER_DY, GATHER_X, BIAS, TMA, EVEN_N, EVEN_K, True, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION, COMPUTE,
                )  # fmt: skip
        row, col = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
        if dw is not None:
            at = dw + tl.cast(expert, tl.int64) * stride_e + row[:, None] * stride_n + col[None, :]
            here = (row < N)[:, None] & (col < K)[None, :]
            tl.store(at, sums.to(dw.dtype.element_ty), mask=None if EVEN_N and EVEN_K else here)
        if BIAS:  # noqa: SIM102 - a constant, for the compiler
            if tile_k == 0:
                tl.store(db + expert * N + row, column_sums.to(db.dtype.element_ty), mask=row < N)


# ------------------------------------------------------------------------------------------------ sums
@triton.jit
def add_slots_kernel(table, out, tokens, N, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out_t = Σ_k table[t · TOP_K + k], in the order of k."""
    t = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    here = (t < tokens) & (col < N)
    total = tl.zeros([ROWS, BLOCK], table.dtype.element_ty)
    for k in range(TOP_K):
        total += tl.load(table + (t * TOP_K + k) * N + col, mask=here, other=0.0)
    tl.store(out + t * N + col, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def add_dots_kernel(
    dots, dy, bias, offsets, perm, out, rows, tiles, experts, N, stride_dy,
    TOP_K: tl.constexpr, GATHER_DY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[slot of row r] = Σ dots[tile, r] over the column tiles, in their order, + dy_r · bias of r's expert."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = r < rows
    total = tl.zeros([ROWS], dots.dtype.element_ty)
    for tile in range(tiles):
        total += tl.load(dots + tile * rows + r, mask=here, other=0.0)
    if bias is not None:
        expert = tl.zeros([ROWS], tl.int32)
        for e in range(1, experts):
            expert += (r >= tl.load(offsets + e)).to(tl.int32)
        source = source_rows(perm, r, rows - 1, TOP_K, GATHER_DY)
        for n in range(0, N, BLOCK):
            col = n + tl.arange(0, BLOCK)
            both = here[:, None] & (col < N)[None, :]
            d = tl.load(dy + source[:, None] * stride_dy + col[None, :], mask=both, other=0.0).to(total.dtype)
            b = tl.load(bias + expert[:, None] * N + col[None, :], mask=both, other=0.0).to(total.dtype)
            total += tl.sum(d * b, 1)
    slot = tl.load(perm + r, mask=here, other=0)
    tl.store(out + slot, total, mask=here)


# ------------------------------------------------------------------------------------------------ host
def _tiles(kind: str, x: torch.Tensor, tma: bool, variant: str = "") -> dict[str, int]:
    """The row of TILES for operands like x."""
    wide = {torch.float32: "float32", torch.float64: "float64"}.get(x.dtype)
    choice = wide or (variant if tma else "pointers")
    return dict(TILES[f"{kind}, {choice}" if choice else kind])


def _plan(
    x: torch.Tensor, weight: torch.Tensor, rows: int, gather: bool, dots: bool = False
) -> tuple[bool, dict[str, int]]:
    """(whether TMA reads the operands, the tiles) of a product."""
    tma = gemm.takes_tma(weight, *(() if gather else (x,)))
    few = "few rows" if rows <= FEW_ROWS * weight.shape[0] else ""
    return tma, _tiles("product", x, tma, "dots" if dots else few)


def dot_tiles(x: torch.Tensor, weight: torch.Tensor, rows: int, gather: bool) -> int:
    """Lines of `dots` that `product` fills with k_first."""
    return triton.cdiv(weight.shape[2], _plan(x, weight, rows, gather, dots=True)[1]["BLOCK_N"])


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    gather: bool,
    scatter: bool,
    k_first: bool,
    row_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    partner: torch.Tensor | None = None,
    gather_partner: bool = False,
    dots: torch.Tensor | None = None,
) -> None:
    """out = rows of x times the matrix of their expert: W_eᵀ of weight `[E, N, K]`, or with k_first W_e of `[E, K, N]`.

    dots, with `partner`: `[dot_tiles(…), rows]`.
    """
    rows, experts = perm.shape[0], weight.shape[0]
    K, N = weight.shape[1:] if k_first else (weight.shape[2], weight.shape[1])
    tma, tiles = _plan(x, weight, rows, gather, partner is not None)
    # Melted loops have the next tile's loads on their way while this one is stored. With both maps at once the
    # addresses of two tiles would spill.
    flatten = tma and not (gather and scatter)
    M_, N_, K_ = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    most = (rows // M_ + min(experts, rows)) * triton.cdiv(N, N_)  # each expert may have one tile that is cut
    stride_k, stride_n = weight.stride()[1:] if k_first else (weight.stride(2), weight.stride(1))
    product_kernel[(min(gemm.programs(x.device, 1), most),)](
        gemm.descriptor(x, M_, K_) if tma and not gather else x,
        gemm.descriptor(weight, *((1, K_, N_) if k_first else (1, N_, K_))) if tma else weight,
        out, offsets, perm, row_weight, bias, partner, dots,
        experts, rows, N, K, x.stride(0), weight.stride(0), stride_k, stride_n, out.stride(0),
        0 if partner is None else partner.stride(0),
        TOP_K=top_k, GATHER=gather, SCATTER=scatter, GATHER_PARTNER=gather_partner, K_FIRST=k_first, TMA=tma,
        EVEN_N=N % N_ == 0, EVEN_K=K % K_ == 0, GROUP_M=GROUP_M, FLATTEN=flatten,
        PRECISION=gemm.precision(x), COMPUTE=gemm.compute(x), **tiles,
    )  # fmt: skip


def weight_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    top_k: int,
    gather_dy: bool,
    gather_x: bool,
    row_weight: torch.Tensor | None = None,
) -> None:
    """Gradients of the weight `[E, N, K]` and the bias `[E, N]`."""
    experts, N, K = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    operands = [t for t, gathered in ((dy, gather_dy), (x, gather_x)) if not gathered]
    tma = bool(operands) and gemm.takes_tma(*operands)
    tiles = _tiles("weight_grad", x, tma, "gathered" if gather_dy or gather_x else "")
    M_, N_, K_ = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    most = experts * triton.cdiv(N, N_) * triton.cdiv(K, K_)
    strides = (0, 0) if grad_weight is None else grad_weight.stride()[:2]
    weight_grad_kernel[(min(gemm.programs(x.device, 1), most),)](
        gemm.descriptor(dy, M_, N_) if tma and not gather_dy else dy,
        gemm.descriptor(x, M_, K_) if tma and not gather_x else x,
        grad_weight, grad_bias, offsets, perm, row_weight,
        experts, N, K, dy.stride(0), x.stride(0), *strides,
        TOP_K=top_k, GATHER_DY=gather_dy, GATHER_X=gather_x, TMA=tma,
        EVEN_N=N % N_ == 0, EVEN_K=K % K_ == 0, GROUP_M=GROUP_M,
        PRECISION=gemm.precision(x), COMPUTE=gemm.compute(x), **tiles,
    )  # fmt: skip


def add_slots(table: torch.Tensor, out: torch.Tensor) -> None:
    """out `[T, N]` = the sum over the K rows of each token of table `[T·K, N]`."""
    tokens, N = out.shape
    grid = (triton.cdiv(tokens, ROW_BLOCK), triton.cdiv(N, COLUMN_BLOCK))
    top_k = table.shape[0] // tokens
    add_slots_kernel[grid](table, out, tokens, N, TOP_K=top_k, ROWS=ROW_BLOCK, BLOCK=COLUMN_BLOCK, num_warps=4)


def add_dots(
    dots: torch.Tensor,
    dy: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    perm: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    gather_dy: bool,
) -> None:
    """Gradient of the routing weights `[T, K]` from the dots of `product`."""
    rows, tiles = perm.shape[0], dots.shape[0]
    add_dots_kernel[(triton.cdiv(rows, ROW_BLOCK),)](
        dots, dy, bias, offsets, perm, out, rows, tiles, offsets.shape[0] - 1, dy.shape[1], dy.stride(0),
        TOP_K=top_k, GATHER_DY=gather_dy, ROWS=ROW_BLOCK, BLOCK=COLUMN_BLOCK, num_warps=4,
    )  # fmt: skip
