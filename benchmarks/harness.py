"""One harness for every benchmark: cases in, tables, CSV, JSON and plots out.

A case is a piece of work and everyone who does it: ours first, then the peers on this machine. Results are compared
with float64 before anybody is timed, so that nobody is timed on a wrong answer. Peers that are missing, too slow or
wrong stay in the table with the reason.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import Peak, header, load_average, measure_peak
from timing import Clock, take_turns

from rom import memory

Tensors = tuple[torch.Tensor, ...]
# Far above any rounding of a correct kernel, far below the effect of a wrong formula.
WRONG = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass
class Contender:
    """Somebody who does the work: `make()` prepares the inputs in its favourite layout and returns the timed call.

    The call's results go through `canonical` before they are compared with the reference: the case's, or its own where
    it computes something else. `predict`, if given, estimates the seconds of a call from a smaller one. `repeats` says
    how often one call does the work; times are for once.
    """

    name: str
    make: Callable[[], Callable[[], Tensors]] | None = None
    missing: str = ""
    canonical: Callable[[Tensors], Tensors] = field(default=lambda results: results)
    reference: Callable[[], Tensors] | None = None
    predict: Callable[[], float] | None = None
    threads: int | None = None
    repeats: int = 1


@dataclass
class Cost:
    """What the work takes at the least: instruction slots (on a CPU of multiply-adds), exponentials, bytes moved."""

    multiply_adds: float
    exps: float
    bytes: float

    def floors(self, peak: Peak, device: str) -> dict[str, float]:
        """Seconds by what binds, on one thread or one GPU. On a CPU an exp is made of multiply-adds."""
        found = {"issue": self.multiply_adds / peak.multiply_adds, "memory": self.bytes / peak.bandwidth}
        if device == "cuda":
            found["MUFU"] = self.exps / peak.exps
        return found

    def floor(self, peak: Peak, device: str) -> float:
        """Seconds below which this machine cannot go."""
        return max(self.floors(peak, device).values())


@dataclass
class Case:
    """A piece of work: `kind` ("forward"), its size in words, ours first among the contenders."""

    kind: str
    size: str
    contenders: Sequence[Contender]
    reference: Callable[[], Tensors]
    dtype: torch.dtype = torch.float32
    cost: Cost | None = None
    clock: str = "wall"


@dataclass
class Row:
    """A line of the table; times in seconds, None where there is none. `ratio` is this time over ours."""

    kind: str
    size: str
    dtype: str
    contender: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    error: float | None = None
    floor: float | None = None
    fraction: float | None = None
    samples: int = 0
    note: str = ""

    def cells(self) -> list[str]:
        """The line as text."""
        return [
            self.kind,
            self.size,
            self.dtype,
            self.contender,
            *(_milliseconds(seconds) for seconds in (self.median, self.low, self.high)),
            str(self.samples or ""),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            _figure(self.error),
            _milliseconds(self.floor),
            "" if self.fraction is None else f"{self.fraction:.0%}",
            self.note,
        ]


@dataclass(frozen=True)
class Target:
    """A figure the project promises: the ratio of `contender` to ours in the rows of `kind` and `size`."""

    kind: str
    size: str
    contender: str
    bound: float
    at_most: bool = False  # the ratio must not exceed the bound (ours is the yardstick) instead of reaching it
    what: str = "ratio"

    def judge(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table of targets."""
        found = [r for r in rows if (r.kind, r.size, r.contender) == (self.kind, self.size, self.contender)]
        value = getattr(found[0], self.what) if found else None
        met = "not measured" if value is None else _yes(value <= self.bound if self.at_most else value >= self.bound)
        bound = f"{'≤' if self.at_most else '≥'} {self.bound:g}"
        return [self.kind, self.size, self.contender, self.what, bound, _figure(value), met]


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.3g}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def worst_error(got: Tensors, reference: Tensors) -> float:
    """The largest deviation over the largest magnitude, over all results; NaN and wrong shapes are infinite."""
    worst = 0.0
    if len(got) != len(reference):
        return float("inf")
    for g, r in zip(got, reference):
        if g.shape != r.shape or not torch.isfinite(g).all():
            return float("inf")
        if r.numel():
            deviation = (g.detach().double() - r.double()).abs().max() / r.double().abs().max().clamp_min(1e-300)
            worst = max(worst, deviation.item())
    return worst


class Benchmark:
    """Runs cases and reports them. `options` come from `arguments()`."""

    def __init__(self, name: str, options: argparse.Namespace, peak: Peak | None = None) -> None:
        self.name, self.options, self.rows = name, options, []  # type: str, argparse.Namespace, list[Row]
        self.started = time.perf_counter()
        kept = memory.keep_freed()  # before anything is measured: page faults are the system's work, not the kernels'
        self.header = {**header(options.device), "freed memory": "kept" if kept else "given back"}
        self.peak = peak or measure_peak(options.device)
        self._say("  ".join(f"{key} {value}" for key, value in self.header.items()))
        self._say(self.peak.describe(options.device))

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def run(self, case: Case) -> list[Row]:
        """Checks and times one case; its rows are kept, and appended to --json at once."""
        self._say(f"[{time.perf_counter() - self.started:4.0f} s] {case.kind} {case.size} …")
        clock = Clock("cuda" if self.options.device == "cuda" else case.clock)
        dtype = str(case.dtype).removeprefix("torch.")
        rows = [Row(case.kind, case.size, dtype, contender.name) for contender in case.contenders]
        reference, ready = case.reference(), []
        for row, contender in zip(rows, case.contenders):
            threads = contender.threads or self.options.threads
            torch.set_num_threads(threads)
            call = self._admit(row, contender, reference, case.dtype)
            if call is not None:
                warm = clock.time(call)
                ready.append((row, (call, warm, lambda n=threads: torch.set_num_threads(n))))
        samples = take_turns(clock, [entry for _, entry in ready], self.options.seconds) if ready else []
        repeats = {contender.name: contender.repeats for contender in case.contenders}
        for (row, _), taken in zip(ready, samples):
            times = taken.median, taken.quantile(0.2), taken.quantile(0.8)
            row.median, row.low, row.high = (seconds / repeats[row.contender] for seconds in times)
            row.samples = len(taken.seconds)
        self._relate(rows, case)
        self.rows += rows
        if self.options.json:
            with open(self.options.json, "a") as file:
                file.writelines(json.dumps({"benchmark": self.name, **self.header, **vars(r)}) + "\n" for r in rows)
        return rows

    def _admit(
        self, row: Row, contender: Contender, reference: Tensors, dtype: torch.dtype
    ) -> Callable[[], Tensors] | None:
        """The call of a contender that is here, fast enough and right; else a note says what it is not."""
        if contender.make is None:
            row.note = f"missing: {contender.missing}"
            return None
        if contender.predict is not None and (seconds := contender.predict()) > self.options.peer_seconds:
            row.note = (
                f"skipped: a call would take about {seconds:.0f} s (--peer-seconds {self.options.peer_seconds:g})"
            )
            return None
        try:
            call = contender.make()
            results = contender.canonical(call())
        except Exception as error:  # out of memory, a module that does not load: the others still run
            row.note = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
            )
            return None
        row.error = worst_error(results, reference if contender.reference is None else contender.reference())
        if row.error > WRONG[dtype]:
            row.note = "not timed: its result is wrong"
            return None
        return call

    def _relate(self, rows: list[Row], case: Case) -> None:
        """Fills in the ratios to ours (the first row) and our share of the floor."""
        ours = rows[0]
        for row in rows:
            if row.median is not None and ours.median is not None:
                row.ratio = row.median / ours.median
        if case.cost is not None and ours.median is not None:
            ours.floor = case.cost.floor(self.peak, self.options.device)
            ours.fraction = ours.floor / ours.median
            if self.options.device == "cuda":
                floors = case.cost.floors(self.peak, "cuda").items()
                ours.note = "floors: " + ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in floors)

    # ------------------------------------------------------------------------------------------------ reports
    def table(self) -> str:
        """All rows as a Markdown table."""
        from tabulate import tabulate

        heads = [
            "work",
            "size",
            "dtype",
            "who",
            "median ms",
            "20 %",
            "80 %",
            "n",
            "× ours",
            "error",
            "floor ms",
            "of floor",
        ]
        return tabulate([r.cells() for r in self.rows], [*heads, "note"], tablefmt="github", disable_numparse=True)

    def finish(self, targets: Sequence[Target] = ()) -> None:
        """Prints the table (and the targets under --targets) and writes --csv, --markdown and --plot.

        Ends the program with exit code 1 if a kernel of ours failed or was wrong.
        """
        from tabulate import tabulate

        heading = ", ".join(f"{key} {value}" for key, value in self.header.items() if key != "load")
        text = f"## {self.name}\n\n{heading}. Load {self.header['load']} before, {load_average()} after.\n"
        text += f"{self.peak.describe(self.options.device)}\n\n{self.table()}\n"
        if self.options.targets and targets:
            heads = ["work", "size", "against", "figure", "target", "measured", "met"]
            judged = tabulate([t.judge(self.rows) for t in targets], heads, tablefmt="github", disable_numparse=True)
            text += f"\nTargets\n\n{judged}\n"
        print(text)
        if self.options.markdown:
            Path(self.options.markdown).write_text(text)
        if self.options.csv:
            with open(self.options.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, ["benchmark", *self.header, *vars(self.rows[0])] if self.rows else [])
                writer.writeheader()
                writer.writerows({"benchmark": self.name, **self.header, **vars(r)} for r in self.rows)
        if self.options.plot:
            from plots import plot

            plot(self.name, self.rows, heading, Path(self.options.plot))
        if broken := [r for r in self.rows if r.contender.startswith("rom") and r.note.startswith(("failed", "not "))]:
            sys.exit("\n".join(f"{r.contender}, {r.kind} {r.size}: {r.note}" for r in broken))


def arguments(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of ours and of the peers (default 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: under half a minute")
    parser.add_argument("--seconds", type=float, help="time for the rounds of one case (default 5, quick 1)")
    parser.add_argument("--peer-seconds", type=float, default=10, help="skip a peer whose call would take longer (10)")
    parser.add_argument(
        "--targets", action="store_true", help="also print what the project promises, and whether it holds"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures")
    parser.add_argument("--json", metavar="FILE", help="append a JSON line per row as soon as its case is done")
    parser.add_argument("--markdown", metavar="FILE", help="write what is printed")
    parser.add_argument("--plot", metavar="FILE", help="draw the medians (PNG or SVG)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses, fills in what depends on other options, and asks for missing packages before anything runs."""
    options = parser.parse_args(argv)
    options.seconds = options.seconds or (1 if options.quick else 5)
    try:
        import tabulate  # noqa: F401

        if options.plot:
            import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is not installed; `pip install 'rom-kernels[bench]'`")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no NVIDIA GPU is visible to torch")
    return options
