"""How a time is taken: contenders in turns, medians and quantiles, and the clock that suits the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# A sample lasts at least this long: calls of microseconds are timed many at a time.
MIN_SAMPLE_SECONDS = 0.004
L2_BYTES = 256 * 2**20  # written between GPU samples, so that no call finds its inputs in the cache


@dataclass
class Samples:
    """Seconds per call."""

    seconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Linear interpolation between the samples in order; share in 0 … 1."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """Times calls by `wall`, by `cpu` (CPU time of this process: deaf to other programs), or by `cuda` (GPU events)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda") if kind == "cuda" else None

    def time(self, call: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call, over `calls` calls in a row."""
        if self._flush is not None:
            return self._time_cuda(call, calls)
        now = time.process_time if self.kind == "cpu" else time.perf_counter
        start = now()
        for _ in range(calls):
            call()
        return (now() - start) / calls

    def _time_cuda(self, call: Callable[[], Any], calls: int) -> float:
        assert self._flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def take_turns(
    clock: Clock,
    contenders: Sequence[tuple[Callable[[], Any], float, Callable[[], None]]],
    seconds: float,
    max_rounds: int = 15,
) -> list[Samples]:
    """Times contenders alternately: ours, a peer, ours, the next peer, … so that drift of the machine hits all alike.

    contenders: (call, seconds of its warm-up call, what to do before each sample), ours first. `seconds` is what all
    rounds together may take; there are at least two.
    """
    samples = [Samples() for _ in contenders]
    calls = [max(1, int(MIN_SAMPLE_SECONDS / max(expected, 1e-7))) for _, expected, _ in contenders]
    costs = [expected * n for (_, expected, _), n in zip(contenders, calls)]
    rivals = range(1, len(contenders)) if len(contenders) > 1 else [0]
    one_round = sum(costs[0] + costs[i] for i in rivals)
    rounds = max(2, min(max_rounds, int(seconds / max(one_round, 1e-9))))
    for _ in range(rounds):
        for rival in rivals:
            for i in {0, rival}:
                call, _, before = contenders[i]
                before()
                samples[i].seconds.append(clock.time(call, calls[i]))
    return samples
