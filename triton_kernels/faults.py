"""Wrong bits beside the library's GEMM: in memory, and in sums on the way (csrc/include/rom/faults.h has the meaning).

Sites are applied in the table's order, also where several hit one word: `patch_kernel` gets them sorted by word, the
first lane of a run goes through it. `accumulate_kernel` forms a sum again in steps of 32 products, one program per sum;
between two steps is where sites can be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import gemm

STEP = 32  # products between two places where an accumulator can be named
BLOCK = 128  # sites per program
ALL = tl.constexpr(-1)  # rom_site.sample, as int32
WORDS = tl.constexpr(8)  # of a site: sample, row, col, k, and_mask, xor_mask, target and flags, fault_id


# ------------------------------------------------------------------------------------------------ memory
@triton.jit
def patch_kernel(
    values, sites, log, order, words,
    n, samples, sample_words,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Words of one sample (SHARED: of all). `order`: rows of the sites by word; `words`: in the same order the word of
    each within a sample, negative for sites that have none here."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1)
    word = tl.load(words + i, mask=i < n, other=-1)
    before = tl.load(words + i - 1, mask=(i < n) & (i > 0), other=-1)
    active = (word >= 0) & (word != before)
    at = values + word + sample.to(tl.int64) * sample_words
    value = tl.load(at, mask=active, other=0)
    mask: tl.constexpr = (1 << value.dtype.primitive_bitwidth) - 1
    bits = value.to(tl.int32) & mask if value.dtype != tl.int32 else value
    turn, changed = i, active & False
    while tl.max(active.to(tl.int32), 0) > 0:
        row = tl.load(order + turn, mask=active, other=0)
        owner = tl.load(sites + row * WORDS, mask=active, other=0)
        hit = active & ((owner == ALL) | (owner == sample)) if not SHARED else active
        keep = tl.load(sites + row * WORDS + 4, mask=hit, other=-1)
        invert = tl.load(sites + row * WORDS + 5, mask=hit, other=0)
        new = (bits & keep) ^ invert
        if value.dtype != tl.int32:
            new = new & mask
        first = hit & ((owner != ALL) | (sample == 0))  # the sample the log tells of
        tl.store(log + row * 3, 1, mask=first)
        tl.store(log + row * 3 + 1, bits, mask=first)
        tl.store(log + row * 3 + 2, new, mask=first)
        bits = tl.where(hit, new, bits)
        changed = changed | hit
        turn += 1
        active = active & (turn < n)
        active = active & (tl.load(words + turn, mask=active, other=-1) == word)
    tl.store(at, bits.to(value.dtype), mask=changed)


# ------------------------------------------------------------------------------------------------ sums
@triton.jit
def add_products(
    total, left, right, weight_k, weights, w, w_end, begin, end, left_stride, right_stride,
    STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(total + the products [begin, end), the first wrong weight at or after end)."""
    for first in range(begin, end, STEP):
        k = first + tl.arange(0, STEP)
        inside = k < end
        x = tl.load(left + k.to(tl.int64) * left_stride, mask=inside, other=0.0).to(COMPUTE)
        y = tl.load(right + k.to(tl.int64) * right_stride, mask=inside, other=0.0).to(COMPUTE)
        stop = tl.minimum(first + STEP, end)
        while (w < w_end) & (tl.load(weight_k + w, mask=w < w_end, other=0) < stop):
            y = tl.where(k == tl.load(weight_k + w), tl.load(weights + w).to(COMPUTE), y)
            w += 1
        total += tl.sum(tl.where(inside, x * y, 0.0), 0)
    return total, w


@triton.jit
def whole_sum(
    total, stored, shift, offset, left, right, weight_k, weights, w, w_end, done, k_size, left_stride, right_stride,
    EXACT: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sum with its bias: its remaining products, or the library's sum and what it has to differ by."""
    if EXACT:
        total, w = add_products(
            total, left, right, weight_k, weights, w, w_end, done, k_size, left_stride, right_stride, STEP, COMPUTE
        )
        return total + offset
    else:
        return stored + shift


@triton.jit
def changed_word(total, site):
    """(the value with one word changed by its site, the old word, the new one)."""
    keep, invert, upper = tl.load(site + 4), tl.load(site + 5), tl.load(site + 6) >> 16
    if total.dtype == tl.float64:
        whole, shift = total.to(tl.int64, bitcast=True), (32 * upper).to(tl.int64)
        old = (whole >> shift).to(tl.int32)
        new = (old & keep) ^ invert
        word = ((new ^ old).to(tl.int64) & 0xFFFFFFFF) << shift
        return (whole ^ word).to(tl.float64, bitcast=True), old, new
    else:
        old = total.to(tl.int32, bitcast=True)
        new = (old & keep) ^ invert
        return new.to(tl.float32, bitcast=True), old, new


@triton.jit
def accumulate_kernel(
    a, b, bias, y, sites, outputs, starts, rows_of, event_k, weight_starts, weight_k, weights, bits,
    heads, rows, k_size, cols,
    a_sample, a_head, a_row, a_k, b_sample, b_head, b_k, b_col,
    EXACT: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One sum of y with what happens to it; see rom_fault_accumulate_args."""
    j = tl.program_id(0).to(tl.int64)
    place = tl.load(outputs + j)
    n, m = place % cols, place // cols % rows
    h, s = place // (cols * rows) % heads, place // (cols * rows * heads)
    left = a + s * a_sample + h * a_head + m * a_row
    right = b + s * b_sample + h * b_head + n * b_col
    w, w_end = tl.load(weight_starts + 2 * j), tl.load(weight_starts + 2 * j + 1)
    stored, zero = tl.load(y + place).to(COMPUTE), tl.full([], 0.0, COMPUTE)
    offset = zero
    if bias is not None:
        offset = tl.load(bias + n).to(COMPUTE)
    changed, total, shift, done = (w_end > w).to(tl.int32), zero, zero, tl.full([], 0, tl.int64)
    if not EXACT:
        for i in range(w, w_end):
            k = tl.load(weight_k + i)
            difference = tl.load(weights + i).to(COMPUTE) - tl.load(right + k * b_k).to(COMPUTE)
            shift += difference * tl.load(left + k * a_k).to(COMPUTE)
    for e in range(tl.load(starts + j), tl.load(starts + j + 1)):
        k = tl.load(event_k + e)
        if k <= k_size:
            total, w = add_products(
                total, left, right, weight_k, weights, w, w_end, done, k, a_k, b_k, STEP, COMPUTE
            )  # fmt: skip
        elif done <= k_size:
            total = whole_sum(
                total, stored, shift, offset, left, right, weight_k, weights, w, w_end, done, k_size, a_k, b_k,
                EXACT, STEP, COMPUTE,
            )  # fmt: skip
        done = k
        after, old, new = changed_word(total, sites + tl.load(rows_of + e) * WORDS)
        tl.store(bits + 2 * e, old)
        tl.store(bits + 2 * e + 1, new)
        changed = changed | (old != new).to(tl.int32)
        shift += after - total
        total = after
    if changed > 0:
        if done <= k_size:
            total = whole_sum(
                total, stored, shift, offset, left, right, weight_k, weights, w, w_end, done, k_size, a_k, b_k,
                EXACT, STEP, COMPUTE,
            )  # fmt: skip
        tl.store(y + place, total.to(y.dtype.element_ty))


# ------------------------------------------------------------------------------------------------ host
_WORD = {8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def fault_patch(
    target: int,
    element_bytes: int,
    samples: int,
    rows: int,
    cols: int,
    ks: int,
    sample_stride: int,
    row_stride: int,
    col_stride: int,
    k_stride: int,
    values: torch.Tensor,
    sites: torch.Tensor,
    log: torch.Tensor,
) -> None:
    """rom_fault_patch of csrc/include/rom/faults.h."""
    words = 2 if element_bytes == 8 else 1
    row, col, k = (sites[:, i].long() & 0xFFFFFFFF for i in (1, 2, 3))
    upper, mine = sites[:, 6] >> 16, (sites[:, 6] & 0xFFFF) == target
    mine &= torch.tensor(samples > 0, device=sites.device) | (sites[:, 0] == ALL.value)
    bad = (upper != 0) & (words == 1)
    for place, extent in ((row, rows), (col, cols), (k, ks)):
        bad |= (place >= extent) & (extent > 0)
    log[:, 0] = torch.where(mine & bad, -1, log[:, 0])
    here = (row * row_stride + col * col_stride + k * k_stride) * words + upper.long()
    ordered, order = torch.where(mine & ~bad, here, -1).sort(stable=True)  # torch sorts; without host synchronisation
    grid = (triton.cdiv(len(sites), BLOCK), max(samples, 1))
    patch_kernel[grid](
        values.view(_WORD[element_bytes]), sites, log, order, ordered, len(sites), samples, sample_stride * words,
        SHARED=samples == 0, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def fault_accumulate(
    exact: int,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    sites: torch.Tensor,
    bits: torch.Tensor,
    outputs: torch.Tensor,
    starts: torch.Tensor,
    rows: torch.Tensor,
    k: torch.Tensor,
    weight_starts: torch.Tensor,
    weight_k: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """rom_fault_accumulate of csrc/include/rom/faults.h."""
    if len(outputs) == 0:
        return
    b_sample = b.stride(0) if b.shape[0] > 1 else 0
    accumulate_kernel[(len(outputs),)](
        a, b, bias, y, sites, outputs, starts, rows, k, weight_starts, weight_k, weights, bits,
        a.shape[1], a.shape[2], a.shape[3], y.shape[3],
        *a.stride(), b_sample, *b.stride()[1:],
        EXACT=bool(exact), STEP=STEP, COMPUTE=gemm.compute(a), num_warps=1,
    )  # fmt: skip
