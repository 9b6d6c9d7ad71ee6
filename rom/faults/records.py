"""The site record: one 32-bit word of one value of one GEMM, and what becomes of its bits.

    v' = (bits & and_mask) ^ xor_mask

covers every bit fault: flip (~0, m), stuck-at-0 (~m, 0), stuck-at-1 (~m, m), set (0, bits). A 64-bit value is two
words, each with records of its own; narrower values are the low bits of a word.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SITE = np.dtype(
    [
        ("sample", "<u4"),
        ("row", "<u4"),
        ("col", "<u4"),
        ("k", "<u4"),
        ("and_mask", "<u4"),
        ("xor_mask", "<u4"),
        ("target", "<u2"),
        ("flags", "<u2"),
        ("fault_id", "<u4"),
    ]
)
WORDS = SITE.itemsize // 4  # a table of sites on a device is int32 [n, WORDS]

#: What an injection did: status, and the word before and after (zero-extended). A table is int32 [n, 3].
LOG = np.dtype([("status", "<i4"), ("old", "<u4"), ("new", "<u4")])
ABSENT, APPLIED = 0, 1  # status: the sample is not in this batch; the masks were applied

ALL = 0xFFFFFFFF  # `sample`: every sample, as a fault in a shared memory is
NOWHERE = 0xFFFFFFFE  # `sample`: none of this batch
UPPER = 1  # `flags`: the upper word of a 64-bit value


class Target(enum.IntEnum):
    """Which value of `Y[row, col] = Σ_k A[row, k] B[k, col] + bias[col]` a site names."""

    A = 0  #: A[sample, row, k] in memory: all columns read it
    B = 1  #: B[k, col] in memory; a sample makes it wrong for that sample only
    ACCUMULATOR = 2  #: the sum of Y[sample, row, col] after its first k products (k a multiple of 32, or all)
    BEFORE_CAST = 3  #: Y with its bias, in the accumulator's dtype
    OUTPUT = 4  #: Y as stored
    BIAS = 5  #: bias[col] in memory


NO_TARGET = 6  # the padding of a table of fixed size


_FIELDS = {  # dtype: (total bits, mantissa bits)
    torch.float64: (64, 52),
    torch.float32: (32, 23),
    torch.bfloat16: (16, 7),
    torch.float16: (16, 10),
    torch.int32: (32, None),
    torch.int8: (8, None),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FIELDS}


def bits_of(dtype: torch.dtype, which: str | int | Sequence[int] = "all") -> tuple[int, ...]:
    """Bit positions, ascending, 0 the least significant.

    dtype: float64, float32, bfloat16, float16, int32 or int8. which: "all", "sign", "exponent", "mantissa" (integers:
    "sign" and "all" only), a position, or several. Raises ValueError for anything else.

    >>> rom.faults.bits_of(torch.bfloat16, "exponent")
    (7, 8, 9, 10, 11, 12, 13, 14)
    """
    if dtype not in _FIELDS:
        raise ValueError(f"rom.faults.bits_of: expected a dtype of {', '.join(DTYPES)}, got {dtype}.")
    total, mantissa = _FIELDS[dtype]
    fields = {"all": range(total), "sign": range(total - 1, total)}
    if mantissa is not None:
        fields |= {"exponent": range(mantissa, total - 1), "mantissa": range(mantissa)}
    if isinstance(which, str):
        if which not in fields:
            raise ValueError(f"rom.faults.bits_of: expected {', '.join(fields)} for {dtype}, got {which!r}.")
        return tuple(fields[which])
    positions = (which,) if isinstance(which, int) else tuple(sorted(set(which)))
    if not positions or positions[0] < 0 or positions[-1] >= total:
        raise ValueError(f"rom.faults.bits_of: expected positions of 0 to {total - 1} for {dtype}, got {which}.")
    return positions


Masks = tuple[int, int]


def flip(mask: int) -> Masks:
    """(and_mask, xor_mask) that inverts the bits of `mask`."""
    return 0xFFFFFFFF, mask


def stuck_at(value: int, mask: int) -> Masks:
    """(and_mask, xor_mask) that holds the bits of `mask` at 0 or 1."""
    if value not in (0, 1):
        raise ValueError(f"rom.faults.stuck_at: expected a value of 0 or 1, got {value}.")
    return 0xFFFFFFFF ^ mask, mask * value


def set_bits(bits: int) -> Masks:
    """(and_mask, xor_mask) that replaces the whole word."""
    return 0, bits


def sites(
    target: Target,
    masks: Masks,
    sample: Any = ALL,
    row: Any = 0,
    col: Any = 0,
    k: Any = 0,
    upper: bool = False,
    fault_id: Any = 0,
) -> np.ndarray:
    """Site records, coordinates broadcast against each other.

    >>> from rom import faults
    >>> faults.sites(faults.Target.OUTPUT, faults.flip(1 << 30), sample=[0, 1], col=7)["col"]
    array([7, 7], dtype=uint32)
    """
    coordinates = np.broadcast_arrays(*np.atleast_1d(sample, row, col, k, fault_id))
    records = np.zeros(coordinates[0].shape, SITE)
    for name, values in zip(("sample", "row", "col", "k", "fault_id"), coordinates):
        if (values < 0).any() or (values > ALL).any():
            raise ValueError(f"rom.faults.sites: expected {name} of 0 to 2**32 - 1, got {values.min()}…{values.max()}.")
        records[name] = values
    records["and_mask"], records["xor_mask"] = masks
    records["target"], records["flags"] = target, UPPER if upper else 0
    return records


def to_tensor(records: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Site records as the int32 `[n, 8]` table that operators read."""
    if not isinstance(records, np.ndarray) or records.dtype != SITE or records.ndim != 1:
        got = f"{records.dtype} {records.shape}" if isinstance(records, np.ndarray) else type(records).__name__
        raise TypeError(f"rom.faults: expected sites of dtype rom.faults.SITE in one dimension, got {got}.")
    words = np.ascontiguousarray(records).view("<i4").reshape(-1, WORDS)
    return torch.from_numpy(words.copy()).to(device)


def log_records(log: torch.Tensor) -> np.ndarray:
    """An operator's log, int32 `[n, 3]`, as records of dtype LOG."""
    return np.ascontiguousarray(log.detach().cpu().numpy()).view(LOG).reshape(-1)
