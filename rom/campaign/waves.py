"""Faults on their way: windows through the segments of the cone, then whole values to the result, in full batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rom.campaign.cone import ROWS, Segment, Windows, blended, rehearsed, whole
from rom.campaign.golden import Batch, Kept
from rom.campaign.lanes import ValueLane
from rom.campaign.outcomes import Tally, bits
from rom.campaign.restart import Pieces
from rom.faults.records import Target

Tail = Callable[[torch.Tensor, Batch], torch.Tensor]
Flow = tuple[Windows, np.ndarray, np.ndarray]  # windows, their samples and their faults


class Chain:
    """The segments of a lane, from the wrong pixel on; `end` is where whole values take over."""

    def __init__(self, pieces: Pieces, shapes: dict[str, torch.Tensor], lane: ValueLane) -> None:
        self.lane = lane
        self.channels_last = lane.layer.kind.startswith("conv") and Target.A in lane.layer.extents
        self.shape = shapes[lane.name].shape
        self.segments: list[Segment] = []
        ends = [lane.name, *(name for name, heavy in pieces.dominators(lane.name) if not heavy)][::-1]
        start, size = lane.name, (1, 1)
        while segment := _longest(pieces, shapes, start, ends, size):
            self.segments.append(segment)
            start, size = segment.end, segment.sizes[segment.end]
            ends = pieces.next_cuts(start)

    @property
    def end(self) -> str:
        """The last cut."""
        return self.segments[-1].end

    def rehearse(self, kept: Kept, trial: Batch) -> None:
        """Keeps the segments that give golden bits, up to the first that does not."""
        right = [rehearsed(segment, kept, trial) for segment in self.segments]
        self.segments = self.segments[: right.index(False) if False in right else None]

    def enter(self, kept: Kept, batch: Batch, sites: np.ndarray) -> tuple[Windows, np.ndarray]:
        """Windows of one pixel with a fault each, and what happened."""
        _, channels, height, width = self.shape
        row, col = sites["row"].astype(np.int64), sites["col"].astype(np.int64)
        if self.channels_last:
            channel, y, x = col, row // width, row % width
        else:
            channel, y, x = row // height, row % height, col
        y, x = (np.append(c, np.zeros(ROWS - len(c), np.int64)) for c in (y, x))
        pixels = blended(kept, self.lane.name, batch, (y, x), (1, 1))
        local = sites.copy()
        local["sample"], local["row"], local["col"] = np.arange(len(sites)), 0, channel
        log = self.lane.patch(pixels, local, (ROWS, 1, channels, 0), (channels, 0, 1, 0))
        return Windows(pixels, y, x), log


def _longest(
    pieces: Pieces, shapes: dict[str, torch.Tensor], start: str, ends: Sequence[str], size: tuple[int, int]
) -> Segment | None:
    """The segment to the first of `ends` that windows reach."""
    for end in ends:
        segment = Segment(pieces, shapes, start, end, size)
        if segment.suitable and all(_picture(pieces, shapes, name) for name in segment.needs):
            return segment
    return None


def _picture(pieces: Pieces, shapes: dict[str, torch.Tensor], name: str) -> bool:
    """Whether windows of a kept value can be found by strides."""
    return name in pieces.places and shapes[name].dim() == 4 and shapes[name].is_contiguous()


class Wave:
    """Windows waiting before every segment of a chain, and behind the last."""

    def __init__(self, chain: Chain, kept: Kept, tally: Tally, arrive: Callable[..., None], size: int) -> None:
        self.chain, self.kept, self.tally, self.arrive, self.size = chain, kept, tally, arrive, size
        self.waiting: list[list[Flow]] = [[] for _ in range(len(chain.segments) + 1)]

    def start(self, sites: np.ndarray, samples: np.ndarray, faults: np.ndarray) -> np.ndarray:
        """At most ROWS faults of one site each; their log."""
        batch = self.kept.batch_of(samples, np.arange(len(samples)), ROWS)
        windows, log = self.chain.enter(self.kept, batch, sites)
        self._pass(0, windows, batch, samples, faults)
        return log

    def flush(self) -> None:
        """Everything to the end."""
        for level in range(1, len(self.waiting)):
            self._drain(level, 1)

    def _pass(self, level: int, windows: Windows, batch: Batch, samples: np.ndarray, faults: np.ndarray) -> None:
        """Through a segment; who is golden again is done."""
        segment = self.chain.segments[level]
        out = segment.run(windows, self.kept, batch)
        golden = blended(self.kept, segment.end, batch, (out.y, out.x), segment.sizes[segment.end])
        changed = (bits(out.values) != bits(golden)).flatten(1).any(1).cpu().numpy()[: len(faults)]
        self.tally.masked(faults[~changed])
        index = np.flatnonzero(changed)
        if len(index):
            self.waiting[level + 1].append((out.choose(index), samples[index], faults[index]))
            self._drain(level + 1, ROWS)

    def _drain(self, level: int, least: int) -> None:
        """Sends on what waits, as long as it is at least so many."""
        if sum(len(faults) for _, _, faults in self.waiting[level]) < least:
            return
        windows, samples, faults = _joined(self.waiting[level])
        self.waiting[level] = []
        last = level == len(self.chain.segments)
        size = self.size if last else ROWS
        for i in range(0, len(faults), size):
            mine = np.arange(i, min(i + size, len(faults)))
            if len(mine) < size and least > 1:
                self.waiting[level] = [(windows.choose(mine), samples[mine], faults[mine])]
                break
            batch = self.kept.batch_of(samples[mine], np.arange(len(mine)), size)
            full = windows.choose(np.append(mine, np.full(size - len(mine), mine[0])))
            if last:
                value = whole(self.kept, self.chain.end, batch, full)
                self.arrive(value, np.arange(len(mine)), batch, faults[mine])
            else:
                self._pass(level, full, batch, samples[mine], faults[mine])


class Queue:
    """Rows that differ from the golden ones at a cut, until they fill a batch. `tail` runs the model behind
    the cut; None: the cut is the result."""

    def __init__(self, kept: Kept, cut: str, tally: Tally, tail: Tail | None, move: bool) -> None:
        self.kept, self.tally, self.tail, self.move = kept, tally, tail, move
        self.layout = kept.layouts[cut]
        self.rows: list[torch.Tensor] = []
        self.samples, self.faults = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def push(
        self, value: torch.Tensor, rows: np.ndarray, batch: Batch, faults: np.ndarray, golden: torch.Tensor
    ) -> None:
        """Faults in some rows of a batch: dropped where they left no trace."""
        first = self.layout.samples_first(value)
        changed = (bits(first) != bits(golden)).flatten(1).any(1).cpu().numpy()[rows]
        self.tally.masked(faults[~changed])
        if changed.any():
            self.add(value, rows[changed], batch, faults[changed])

    def add(self, value: torch.Tensor, rows: np.ndarray, batch: Batch, faults: np.ndarray) -> None:
        """Faults in some rows of a batch that are not golden."""
        first = self.layout.samples_first(value)
        samples, size = batch.samples[rows], self.kept.batch
        if self.tail is None:
            self.tally.judge(first[torch.from_numpy(rows)], samples, faults)
        elif not self.move or (len(rows) == size and not self.rows):
            logits = self.tail(value, batch)
            self.tally.judge(logits[torch.from_numpy(rows)], samples, faults)
        else:
            self.rows.append(first[torch.from_numpy(rows)])
            self.samples, self.faults = np.append(self.samples, samples), np.append(self.faults, faults)
            if len(self.samples) >= size:
                self._run()

    def flush(self) -> None:
        """Runs what is left, filled up to a batch."""
        if len(self.samples):
            self._run()

    def _run(self) -> None:
        assert self.tail is not None
        size, rows = self.kept.batch, torch.cat(self.rows)
        n = min(size, len(rows))
        samples, faults = self.samples[:n], self.faults[:n]
        full = rows[torch.arange(size).clamp(max=n - 1)] if n < size else rows[:size]
        batch = self.kept.batch_of(samples, np.arange(n))
        logits = self.tail(self.layout.batch(full), batch)
        self.tally.judge(logits[:n], samples, faults)
        self.rows = [rows[n:]] if len(rows) > n else []
        self.samples, self.faults = self.samples[n:], self.faults[n:]


def _joined(flows: Sequence[Flow]) -> Flow:
    windows, samples, faults = zip(*flows)
    values = torch.cat([w.values for w in windows])
    together = Windows(values, np.concatenate([w.y for w in windows]), np.concatenate([w.x for w in windows]))
    return together, np.concatenate(samples), np.concatenate(faults)
