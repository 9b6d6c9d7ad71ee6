"""In which order the faults of a plan run, and the blocks they run in.

A block is what is done or not done: its faults run together and are stored in one transaction. The order is the plan's,
but a stratified plan takes its strata in turn, so that every beginning of a campaign is a stratified sample itself: one
that is stopped or looked at early has met all strata, in proportion.

A plan that is extended begins a new stage. The blocks of the stages before keep their numbers and their faults.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from rom.faults import FaultPlan

Counts = tuple[int, ...]  # as `FaultPlan.counts`


class Blocks:
    """The blocks of a campaign: `blocks[b]` are the positions (int64) of the faults of block b, `len(blocks)` counts.

    Args:
        plan: as it is now.
        size: faults per block; the last one of a stage may be shorter.
        stages: the counts of the plan when the campaign began and after each extension; the last are the plan's.

    >>> from rom import campaign, faults
    >>> layer = faults.Stratum("head", faults.Target.OUTPUT, "float32", samples=1000, cols=10)
    >>> plan = faults.FaultPlan.stratified([layer, layer], [2, 4], seed=7)
    >>> [list(map(int, block)) for block in campaign.Blocks(plan, size=3, stages=[plan.counts])]
    [[2, 0, 3], [4, 1, 5]]
    """

    def __init__(self, plan: FaultPlan, size: int, stages: Sequence[Counts]) -> None:
        self.size = size
        before = [tuple(0 for _ in plan.counts), *stages]
        self._orders = [_Order(plan, *pair) for pair in zip(before, stages)]
        self._first = [0, *accumulate(-(-len(order) // size) for order in self._orders)]

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, block: int) -> np.ndarray:
        if not 0 <= block < len(self):
            raise IndexError(f"rom.campaign.Blocks: expected a block below {len(self)}, got {block}.")
        stage = bisect_right(self._first, block) - 1
        start = (block - self._first[stage]) * self.size
        return self._orders[stage][start : start + self.size]

    def faults(self, blocks: int) -> int:
        """Faults in the first `blocks` blocks."""
        whole = [min(max(blocks - first, 0) * self.size, len(o)) for first, o in zip(self._first, self._orders)]
        return sum(whole)


class _Order:
    """The positions that an extension from counts `before` to `after` adds, in the order in which they run."""

    def __init__(self, plan: FaultPlan, before: Counts, after: Counts) -> None:
        self.length = sum(after) - sum(before)
        self.start = sum(before)
        self.positions: np.ndarray | None = None
        if plan.scheme == "stratified":
            self.positions = _in_turn(before, after, starts(plan.counts))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, span: slice) -> np.ndarray:
        if self.positions is not None:
            return self.positions[span]
        first, stop, _ = span.indices(self.length)
        return np.arange(self.start + first, self.start + stop)


def _in_turn(before: Counts, after: Counts, first: np.ndarray) -> np.ndarray:
    """Fault j of the n of a stratum comes at (j + ½) / n: every stratum is spread evenly over the whole."""
    old, added = np.array(before, np.int64), np.array(after, np.int64) - np.array(before, np.int64)
    stratum = np.repeat(np.arange(len(added)), added)
    j = np.arange(len(stratum)) - np.repeat(starts(added), added)
    order = np.argsort((j + 0.5) / added[stratum], kind="stable")
    return (first[stratum] + old[stratum] + j)[order]


def starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """The position of each stratum's first fault."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[: len(counts)]
