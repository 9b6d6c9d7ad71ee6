"""A stratum: a population of single-bit faults, numbered from 0; any one is written down without the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rom.faults.permutation import MAX_SIZE
from rom.faults.records import ALL, DTYPES, SITE, UPPER, Target, bits_of

K_STEP = 32  # accumulators can be named after multiples of it, so that every tile depth that divides it agrees
KINDS = ("flip", "stuck0", "stuck1")


@dataclass(frozen=True)
class Stratum:
    """The faults of one kind in one operand or result of one layer.

    Args:
        layer: its name in the model (`rom.faults.trace.survey`), "" for a single operator.
        target: which value (`rom.faults.Target`).
        dtype: of that value, by name; "float32" for the accumulator of bfloat16 products.
        samples: how many inputs the data set has; None: a fault hits every sample, as in a shared memory.
        rows, cols, k: extents of the GEMM Y[row, col] = Σ_k A[row, k] B[k, col], of one sample. For B, rows counts the
            matrices (1 unless they are batched).
        bits: positions, from `rom.faults.bits_of`; empty: all of the dtype.
        kind: "flip", "stuck0" or "stuck1".

    `size` faults are numbered sample by sample, then by row, col, k and bit. ValueError: an extent below 1, more than
    2**62 faults, an unknown dtype or kind.

    >>> head = rom.faults.Stratum("head", rom.faults.Target.OUTPUT, "float32", samples=100, rows=1, cols=10)
    >>> head.size, len(head.by_bit())
    (32000, 32)
    """

    layer: str
    target: Target
    dtype: str
    samples: int | None
    rows: int = 1
    cols: int = 1
    k: int = 1
    bits: tuple[int, ...] = ()
    kind: str = "flip"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"rom.faults.Stratum: expected a dtype of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.kind not in KINDS:
            raise ValueError(f"rom.faults.Stratum: expected a kind of {', '.join(KINDS)}, got {self.kind!r}.")
        object.__setattr__(self, "target", Target(self.target))
        object.__setattr__(self, "bits", bits_of(DTYPES[self.dtype], self.bits or "all"))
        limit = ALL - 1  # the two largest samples have meanings of their own
        for name in ("samples", "rows", "cols", "k"):
            extent = getattr(self, name)
            if not (extent is None and name == "samples") and not 1 <= extent < limit:
                raise ValueError(f"rom.faults.Stratum: expected {name} of 1 to 2**32 - 3, got {extent}.")
        if self.size > MAX_SIZE:
            raise ValueError(f"rom.faults.Stratum: expected at most 2**62 faults, got {self.size} in {self.layer!r}.")

    @property
    def coordinates(self) -> dict[str, int]:
        """The coordinates this target has, and how many values each takes; the slowest first."""
        names = {
            Target.A: ("sample", "row", "k"),
            Target.B: ("sample", "row", "col", "k"),
            Target.ACCUMULATOR: ("sample", "row", "col", "k"),
            Target.BIAS: ("sample", "col"),
        }.get(self.target, ("sample", "row", "col"))
        steps = -(-self.k // K_STEP) if self.target == Target.ACCUMULATOR else self.k
        extents = {"sample": self.samples or 1, "row": self.rows, "col": self.cols, "k": steps}
        return {name: extents[name] for name in names}

    @property
    def size(self) -> int:
        """Number of faults, N_h."""
        return math.prod(self.coordinates.values()) * len(self.bits)

    def by_bit(self) -> list[Stratum]:
        """A stratum per bit: faults of one bit behave alike, so fewer are needed (5.5 × fewer in the dossier)."""
        return [replace(self, bits=(bit,)) for bit in self.bits]

    def sites(self, number: Any, fault_id: Any = 0) -> np.ndarray:
        """The records of the faults of these numbers (uint64 below `size`)."""
        rest = np.asarray(number, np.uint64).reshape(-1)
        if rest.size and int(rest.max()) >= self.size:
            raise ValueError(f"rom.faults: expected a fault number below {self.size}, got {int(rest.max())}.")
        records = np.zeros(rest.shape, SITE)
        rest, digit = np.divmod(rest, np.uint64(len(self.bits)))
        bit = np.array(self.bits, np.uint32)[digit.astype(np.int64)]
        for name, extent in reversed(self.coordinates.items()):
            rest, digit = np.divmod(rest, np.uint64(extent))
            records[name] = digit
        if self.target == Target.ACCUMULATOR:
            records["k"] = np.minimum((records["k"] + np.uint32(1)) * np.uint32(K_STEP), np.uint32(self.k))
        if self.samples is None:
            records["sample"] = ALL
        mask = np.left_shift(np.uint32(1), bit % np.uint32(32))
        records["and_mask"] = 0xFFFFFFFF if self.kind == "flip" else ~mask
        records["xor_mask"] = 0 if self.kind == "stuck0" else mask
        records["flags"] = np.where(bit >= 32, UPPER, 0)
        records["target"], records["fault_id"] = self.target, fault_id
        return records

    def check(self, records: np.ndarray) -> None:
        """Every record must lie in this stratum's extents; ValueError names the first that does not."""
        extents = self.coordinates | ({"k": self.k + 1} if self.target == Target.ACCUMULATOR else {})
        if self.samples is not None:
            extents["sample"] = self.samples
        for name, values in _limits(records, extents):
            wrong = (values >= extents[name]) & ~((name == "sample") & (values == ALL))
            if wrong.any():
                at = int(wrong.argmax())
                raise ValueError(
                    f"rom.faults: expected {name} below {extents[name]} in layer {self.layer!r} "
                    f"({self.target.name.lower()}), got {values[at]} in site {at}."
                )
        if (records["target"] != self.target).any():
            raise ValueError(f"rom.faults: expected sites of target {self.target.name} in layer {self.layer!r}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Stratum(**values)` reads them back."""
        return asdict(self) | {"target": int(self.target), "bits": list(self.bits)}


def _limits(records: np.ndarray, extents: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, records[name].astype(np.uint64)) for name in extents)
