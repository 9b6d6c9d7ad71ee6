"""The numbers of a campaign's report: by layer and target, by bit, and overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rom.campaign import statistics
from rom.campaign.statistics import Estimate
from rom.faults import UPPER, FaultPlan, Stratum, bits_of
from rom.faults.records import DTYPES

TARGETS = {
    "A": "input",
    "B": "weight",
    "ACCUMULATOR": "accumulator",
    "BEFORE_CAST": "sum before the cast",
    "OUTPUT": "output",
    "BIAS": "bias",
}


@dataclass(frozen=True)
class Group:
    """A layer's faults of one target."""

    layer: str
    target: str
    name: str  # for the axis of a plot: the target only where a layer has several
    population: int
    faults: int
    cells: int
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class BitMap:
    """Rates of top-1 changes by layer (rows) and bit: nan without a fault, and where the dtype has no such bit."""

    names: list[str]
    rates: np.ndarray  # float64 [rows, bits]
    faults: np.ndarray  # int64 [rows, bits]
    exists: np.ndarray  # bool [rows, bits]: the plan could have drawn a fault there
    borders: list[tuple[int, ...]]  # bits at which fields begin: exponent and sign


def _members(strata: Sequence[Stratum]) -> dict[tuple[str, str], list[int]]:
    """Numbers of the strata by (layer, target), in the order of the plan."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, stratum in enumerate(strata):
        found.setdefault((stratum.layer, TARGETS[stratum.target.name]), []).append(number)
    return found


def _names(keys: Sequence[tuple[str, str]]) -> list[str]:
    several = len({target for _, target in keys}) > 1
    return [f"{layer or '(whole)'} · {target}" if several else layer or "(whole)" for layer, target in keys]


def by_layer(table: np.ndarray, plan: FaultPlan, level: float, resamples: int = 1000) -> list[Group]:
    """What faults of every layer and target do; those without a fault are left out (see `unseen`)."""
    members = _members(plan.strata)
    out = []
    for name, ((layer, target), numbers) in zip(_names(list(members)), members.items()):
        rows = table[np.isin(table["stratum"], numbers)]
        if not len(rows):
            continue
        size = sum(plan.strata[h].size for h in numbers)
        found = _estimates(rows, plan, numbers, level, resamples)
        out.append(Group(layer, target, name, size, len(rows), int(rows["cells"].sum()), found))
    return out


def _estimates(
    rows: np.ndarray, plan: FaultPlan, numbers: Sequence[int], level: float, resamples: int
) -> dict[str, Estimate]:
    """Each stratum by its size; in a simple random sample every fault the same, which is the same on average."""
    if plan.scheme == "stratified" and len(numbers) > 1:
        local = rows.copy()
        local["stratum"] = np.searchsorted(numbers, rows["stratum"])
        return statistics.overall(local, [plan.strata[h] for h in numbers], "neuron", level, resamples)
    size = None if plan.scheme == "file" else sum(plan.strata[h].size for h in numbers)
    return statistics.estimates(rows, size, level, resamples)


def overall(
    table: np.ndarray, plan: FaultPlan, groups: Sequence[Group], level: float, resamples: int = 1000
) -> dict[str, dict[str, Estimate]]:
    """All faults of the plan, "neuron": weighted by size, and "layer": every layer the same."""
    if not len(table):
        return {}
    out = {"neuron": _estimates(table, plan, range(len(plan.strata)), level, resamples)}
    layers = {group.layer for group in groups}
    if len(layers) > 1:
        size = {layer: sum(g.population for g in groups if g.layer == layer) for layer in layers}
        weights = [g.population / size[g.layer] / len(layers) for g in groups]
        names = (*statistics.RATES, "delta_loss")
        out["layer"] = {name: _combined([g.estimates[name] for g in groups], weights) for name in names}
    return out


def _combined(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    if all(math.isfinite(part.value) for part in parts):
        return statistics.stratified(parts, weights)
    return Estimate(math.nan, math.nan, math.nan)  # a layer whose cells are all due has no |Δloss|


def unseen(table: np.ndarray, plan: FaultPlan) -> tuple[int, int, float]:
    """Strata without a fault, strata whose faults never changed a top-1, and the largest rate those may still have."""
    drawn = np.bincount(table["stratum"], minlength=len(plan.strata))
    hit = np.bincount(table["stratum"], table["mismatch"] > 0, len(plan.strata))
    silent = np.flatnonzero((drawn > 0) & (hit == 0))
    worst = 0.0
    for h in silent:
        size = None if plan.scheme == "file" else plan.strata[h].size
        worst = max(worst, statistics.rule_of_three(int(drawn[h]), size))
    return int((drawn == 0).sum()), len(silent), worst


def bits_of_faults(plan: FaultPlan, positions: np.ndarray) -> np.ndarray:
    """The bit each fault is in; −1 for faults of several bits or words."""
    sites = plan.take(positions).sites
    if plan.scheme == "file":
        ids, first, counts = np.unique(sites["fault_id"], return_index=True, return_counts=True)
        if not len(ids):
            return np.full(len(positions), -1)
        place = np.minimum(np.searchsorted(ids, positions), len(ids) - 1)
        several = (counts[place] > 1) | (ids[place] != positions)  # a realisation of a rate may have no site at all
        sites = sites[first[place]]
    else:
        several = np.zeros(len(sites), bool)
    mask = ~sites["and_mask"] | sites["xor_mask"]
    single = (mask & (mask - np.uint32(1))) == 0
    bit = np.log2(np.maximum(mask, 1)).astype(np.int64) + 32 * ((sites["flags"] & UPPER) != 0)
    return np.where(single & (mask != 0) & ~several, bit, -1)


def bit_map(table: np.ndarray, plan: FaultPlan) -> BitMap:
    """Top-1 changes over cells, of every layer and bit."""
    members = _members(plan.strata)
    bit = bits_of_faults(plan, table["position"])
    width = max(max(stratum.bits) for stratum in plan.strata) + 1
    rates, faults = np.full((len(members), width), np.nan), np.zeros((len(members), width), np.int64)
    exists, borders = np.zeros((len(members), width), bool), []
    for row, numbers in enumerate(members.values()):
        for h in numbers:
            exists[row, list(plan.strata[h].bits)] = True
        mine = np.isin(table["stratum"], numbers) & (bit >= 0)
        faults[row] = np.bincount(bit[mine], minlength=width)
        changed, cells = (np.bincount(bit[mine], table[name][mine], width) for name in ("mismatch", "cells"))
        np.divide(changed, cells, out=rates[row], where=cells > 0)
        borders.append(_borders(plan.strata[numbers[0]].dtype, width))
    return BitMap(_names(list(members)), rates, faults, exists, borders)


def _borders(dtype: str, width: int) -> tuple[int, ...]:
    kinds = ("exponent", "sign") if DTYPES[dtype].is_floating_point else ("sign",)
    starts = (bits_of(DTYPES[dtype], kind)[0] for kind in kinds)
    return tuple(start for start in starts if start < width)
