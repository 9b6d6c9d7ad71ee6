"""`FaultPlan`: which faults a campaign injects, as a small description that any process can unfold the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rom import files
from rom.faults.permutation import MAX_SIZE, permute
from rom.faults.population import Stratum
from rom.faults.rates import compile_rate
from rom.faults.records import SITE

SCHEMA = 1  # raised whenever the same description would unfold to other sites
MAGIC = b"rom-faults\n"
SCHEMES = ("simple", "stratified", "exhaustive", "file")
_UNION = 0xFFFFFFFF  # the stream of a simple random sample; strata have their own numbers


class Faults(NamedTuple):
    """Some faults of a plan: per site record the stratum it belongs to. Records of one fault share a fault_id."""

    stratum: np.ndarray  # int32 [n]
    sites: np.ndarray  # SITE [n]


@dataclass(frozen=True, eq=False)
class FaultPlan:
    """Faults to inject, in a fixed order: `plan[i:j]` writes down faults i to j, `len(plan)` counts them.

    Nothing is drawn twice; fault i costs the same whatever i is; a plan unfolds to the same sites in every process, on
    every device and for every batch size; and `extended` keeps what was there. Build one with `simple`, `stratified`,
    `exhaustive`, `rate` or `from_sites`.

    >>> from rom import faults
    >>> head = faults.Stratum("head", faults.Target.OUTPUT, "float32", samples=1000, cols=10)
    >>> plan = faults.FaultPlan.simple([head], 500, seed=7)
    >>> len(plan), len(plan[:3].sites), plan.extended(800)[499].sites == plan[499].sites
    (500, 3, array([ True]))
    """

    strata: tuple[Stratum, ...]
    scheme: str
    counts: tuple[int, ...]  # faults per stratum; ("simple" and "file": of all of them)
    seed: int = 0
    model: str = ""  # fingerprint of the model it was made for
    data: str = ""  # fingerprint of the data set
    records: Faults | None = None  # what "file" has instead of a seed

    # ------------------------------------------------------------------------------------------------ schemes
    @classmethod
    def simple(cls, strata: Iterable[Stratum], n: int, seed: int, model: str = "", data: str = "") -> FaultPlan:
        """A simple random sample of n faults of the union of the strata, without replacement."""
        return cls(tuple(strata), "simple", (n,), seed, model, data)._checked()

    @classmethod
    def stratified(
        cls, strata: Iterable[Stratum], counts: Sequence[int], seed: int, model: str = "", data: str = ""
    ) -> FaultPlan:
        """A simple random sample of counts[h] faults in every stratum h; `rom.faults.neyman` allocates."""
        return cls(tuple(strata), "stratified", tuple(counts), seed, model, data)._checked()

    @classmethod
    def exhaustive(cls, strata: Iterable[Stratum], model: str = "", data: str = "") -> FaultPlan:
        """Every fault of every stratum, in the strata's own order."""
        strata = tuple(strata)
        return cls(strata, "exhaustive", tuple(s.size for s in strata), 0, model, data)._checked()

    @classmethod
    def rate(
        cls,
        strata: Iterable[Stratum],
        rate: float,
        seed: int,
        realisations: int = 1,
        model: str = "",
        data: str = "",
    ) -> FaultPlan:
        """Every bit of the strata is hit independently with probability `rate`; each realisation is one fault."""
        strata = tuple(strata)
        parts = [compile_rate(strata, rate, seed, r) for r in range(realisations)]
        owners, tables = (np.concatenate(column) for column in zip(*parts))
        return cls(strata, "file", (realisations,), seed, model, data, Faults(owners, tables))._checked()

    @classmethod
    def from_sites(
        cls, strata: Iterable[Stratum], stratum: Any, sites: np.ndarray, model: str = "", data: str = ""
    ) -> FaultPlan:
        """The given records (dtype `rom.faults.SITE`); `stratum` is the number of each one's stratum.

        Records of one fault_id are one fault; fault_ids ascend from 0.
        """
        owners = np.broadcast_to(np.asarray(stratum, np.int32), sites.shape).copy()
        n = int(sites["fault_id"].max()) + 1 if len(sites) else 0
        return cls(tuple(strata), "file", (n,), 0, model, data, Faults(owners, sites.copy()))._checked()

    def _checked(self) -> FaultPlan:
        if not self.strata:
            raise ValueError("rom.faults.FaultPlan: expected at least one stratum, got none.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"rom.faults.FaultPlan: expected a seed of 0 to 2**64 - 1, got {self.seed}.")
        if self.scheme == "file":
            self._check_records()
            return self
        sizes = [self.population] if self.scheme == "simple" else [s.size for s in self.strata]
        if len(self.counts) != len(sizes):
            raise ValueError(f"rom.faults.FaultPlan: expected {len(sizes)} counts, got {len(self.counts)}.")
        for number, (count, size) in enumerate(zip(self.counts, sizes)):
            if not 0 <= count <= size:
                raise ValueError(f"rom.faults.FaultPlan: expected a count of 0 to {size}, got {count} ({number}).")
        if max(self.counts) > 2**32:
            raise ValueError("rom.faults.FaultPlan: expected at most 2**32 faults per stratum: a fault_id is 32 bits.")
        return self

    def _check_records(self) -> None:
        assert self.records is not None
        owners, records = self.records
        if records.dtype != SITE or owners.shape != records.shape:
            raise TypeError("rom.faults.FaultPlan: expected sites of dtype rom.faults.SITE and a stratum for each.")
        if len(records) and (np.diff(records["fault_id"].astype(np.int64)) < 0).any():
            raise ValueError("rom.faults.FaultPlan: expected sites in ascending order of fault_id.")
        if len(owners) and not (owners.min() >= 0 and owners.max() < len(self.strata)):
            raise ValueError(f"rom.faults.FaultPlan: expected strata below {len(self.strata)}, got {owners.max()}.")
        for number, stratum in enumerate(self.strata):
            stratum.check(records[owners == number])

    # ------------------------------------------------------------------------------------------------ unfolding
    @property
    def population(self) -> int:
        """Number of faults the plan samples from."""
        total = sum(stratum.size for stratum in self.strata)
        if total > MAX_SIZE:
            raise ValueError(f"rom.faults.FaultPlan: expected at most 2**62 faults in all, got {total}.")
        return total

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, faults: int | slice) -> Faults:
        if isinstance(faults, int):
            if not -len(self) <= faults < len(self):
                raise IndexError(f"rom.faults.FaultPlan: expected a fault below {len(self)}, got {faults}.")
            faults = slice(faults % len(self), faults % len(self) + 1)
        return self.take(np.arange(*faults.indices(len(self))))

    def shard(self, index: int, of: int) -> np.ndarray:
        """Positions of the faults of shard `index`; the shards of one `of` are disjoint and complete."""
        if not 0 <= index < of:
            raise ValueError(f"rom.faults.FaultPlan.shard: expected an index of 0 to {of - 1}, got {index}.")
        return np.arange(index, len(self), of)

    def take(self, positions: Any) -> Faults:
        """The faults at these positions, in this order."""
        positions = np.asarray(positions, np.int64).reshape(-1)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"rom.faults.FaultPlan: expected positions below {len(self)}, got {positions.max()}.")
        if self.records is not None:
            ids = self.records.sites["fault_id"]
            spans = zip(*(np.searchsorted(ids, positions, side=side) for side in ("left", "right")))
            rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in spans)])
            return Faults(self.records.stratum[rows], self.records.sites[rows])
        if self.scheme == "simple":
            numbers = permute(self.population, self.seed, _UNION, positions)
            stratum, ends = self._locate(numbers, [s.size for s in self.strata])
            return self._unfold(stratum, numbers - ends, positions)
        stratum, starts = self._locate(positions.astype(np.uint64), self.counts)
        draws = positions - starts.astype(np.int64)
        if self.scheme == "exhaustive":
            return self._unfold(stratum, draws.astype(np.uint64), draws)
        numbers = np.zeros(len(positions), np.uint64)
        for h in np.unique(stratum):
            mine = stratum == h
            numbers[mine] = permute(self.strata[h].size, self.seed, h, draws[mine])
        return self._unfold(stratum, numbers, draws)

    @staticmethod
    def _locate(numbers: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """In which of consecutive ranges each number lies, and where that range starts."""
        starts = np.array([0, *accumulate(sizes)], np.uint64)
        which = np.searchsorted(starts, numbers, side="right") - 1
        return which.astype(np.int32), starts[which]

    def _unfold(self, stratum: np.ndarray, numbers: np.ndarray, draws: np.ndarray) -> Faults:
        sites = np.zeros(len(numbers), SITE)
        for h in np.unique(stratum):
            mine = stratum == h
            sites[mine] = self.strata[h].sites(numbers[mine], draws[mine])
        return Faults(stratum, sites)

    def extended(self, counts: int | Sequence[int]) -> FaultPlan:
        """The same sample, made longer: the first faults of every stratum (of the whole, for "simple") stay."""
        if self.scheme not in ("simple", "stratified"):
            raise ValueError(f"rom.faults.FaultPlan.extended: a plan of scheme {self.scheme!r} has no continuation.")
        wanted = (counts,) if isinstance(counts, int) else tuple(counts)
        if len(wanted) != len(self.counts) or any(new < old for new, old in zip(wanted, self.counts)):
            raise ValueError(f"rom.faults.FaultPlan.extended: expected counts of at least {self.counts}, got {wanted}.")
        return replace(self, counts=wanted)._checked()

    # ------------------------------------------------------------------------------------------------ files
    def fingerprint(self) -> str:
        """A digest of everything that decides which faults these are; a plan and its extension share it."""
        header = self._header()
        if self.records is None:
            del header["counts"]
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def _header(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "scheme": self.scheme,
            "seed": self.seed,
            "model": self.model,
            "data": self.data,
            "counts": list(self.counts),
            "strata": [stratum.to_json() for stratum in self.strata],
            "sites": 0 if self.records is None else len(self.records.sites),
            "sha256": hashlib.sha256(self._payload()).hexdigest(),
        }

    def _payload(self) -> bytes:
        if self.records is None:
            return b""
        return self.records.stratum.astype("<i4").tobytes() + self.records.sites.tobytes()

    def save(self, path: str | Path) -> None:
        """Writes the plan: a line of JSON that says all, and for explicit sites their records. Never half a file."""
        with files.replacing(Path(path)) as partial:
            partial.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return MAGIC + json.dumps(self._header()).encode() + b"\n" + self._payload()

    @classmethod
    def load(cls, path: str | Path) -> FaultPlan:
        """Reads a plan; ValueError when the file is no plan, of another schema, or damaged."""
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, content: bytes, path: str = "the content") -> FaultPlan:
        """What `to_bytes` gave; `path` is its name in errors, which are those of `load`."""
        if not content.startswith(MAGIC) or b"\n" not in content[len(MAGIC) :]:
            raise ValueError(f"rom.faults.FaultPlan.load: {path} is not a fault plan.")
        line, payload = content[len(MAGIC) :].split(b"\n", 1)
        header = json.loads(line)
        if header["schema"] != SCHEMA:
            raise ValueError(
                f"rom.faults.FaultPlan.load: expected schema {SCHEMA}, got {header['schema']} in {path}. "
                "Use the version of rom that wrote it."
            )
        if hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise ValueError(f"rom.faults.FaultPlan.load: {path} is damaged: its sites do not match their digest.")
        n = header["sites"]
        records = Faults(np.frombuffer(payload, "<i4", n).copy(), np.frombuffer(payload, SITE, n, 4 * n).copy())
        return cls(
            tuple(Stratum(**values | {"bits": tuple(values["bits"])}) for values in header["strata"]),
            header["scheme"],
            tuple(header["counts"]),
            header["seed"],
            header["model"],
            header["data"],
            records if header["scheme"] == "file" else None,
        )._checked()


def model_fingerprint(model: torch.nn.Module) -> str:
    """A digest of a model's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
