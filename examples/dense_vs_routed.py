"""Does routing pay? Routing Mamba against its dense twin: equal active parameters, text and steps, several seeds.

    python examples/dense_vs_routed.py --steps 2000 --out runs/dense_vs_routed

Every run is a `rom train` of its own on one thread, `--jobs` of them at a time: two single-threaded runs use two cores
better than one run on both, and steps, not the clock, make them equal. Interrupt and repeat the command to go on.
Writes a table (Markdown and CSV) and a plot of the mean validation curves with their 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

VARIANTS = {"routed": [], "dense": ["--dense"]}
COLOURS = {"routed": "#1f4e79", "dense": "#c0504d"}
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % at 1, 2, … degrees of freedom


def main() -> int:
    """Trains what is not trained yet, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dense_vs_routed"), metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per variant, 2 to 10 (default 3)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a thread each (default 2)")
    parser.add_argument("--steps", type=int, metavar="N", help="length of every run in steps (equal text)")
    parser.add_argument("--minutes", type=float, metavar="M", help="length of every run by the clock (equal time)")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION…", help="more options for `rom train`, after --")
    args = parser.parse_args()
    if not 2 <= args.seeds <= 10 or args.jobs < 1 or (args.steps is None) == (args.minutes is None):
        parser.error("expected --steps or --minutes, 2 to 10 seeds and at least one job")
    length = ["--steps", str(args.steps)] if args.steps else ["--minutes", str(args.minutes)]
    # In pairs of one seed: an interrupted study has comparable runs.
    runs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    commands = {
        args.out / f"{variant}-{seed}": [*VARIANTS[variant], "--seed", str(seed), *length, *args.rest]
        for variant, seed in runs
    }
    if not train_all(commands, args.jobs):
        return 1
    results = {
        variant: [read_run(args.out / f"{variant}-{seed}") for seed in range(args.seeds)] for variant in VARIANTS
    }
    print(report(args.out, results, " ".join([*length, *args.rest])))
    return 0


# ---------------------------------------------------------------------------------------------------- training
def train_all(commands: dict[Path, list[str]], jobs: int) -> bool:
    """Runs the trainings, a few at a time, saying every half minute where they are; False if one failed."""
    waiting, running = list(commands), {}
    said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                running[folder] = start(folder, commands[folder])
            time.sleep(0.5)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    if process.returncode:
                        print(f"{folder} failed:\n{(folder / 'output.txt').read_text()}", file=sys.stderr)
                        return False
                    print(f"{folder}: {read_run(folder)['best']:.4f} bits per byte", flush=True)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                print(", ".join(position(folder) for folder in running), f"– {len(waiting)} more to come", flush=True)
    finally:
        for process in running.values():
            process.terminate()  # they save and end
            process.wait()
    return True


def start(folder: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """One `rom train`, resumed if it was begun."""
    folder.mkdir(parents=True, exist_ok=True)
    rom = shutil.which("rom", path=Path(sys.executable).parent) or "rom"
    command = [rom, "train", "--out", str(folder), "--resume", "--threads", "1", *options]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def position(folder: Path) -> str:
    """Where a run is."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return f"{folder.name} at step {json.loads(lines[-1])['step'] if lines else 0}"


def read_run(folder: Path) -> dict[str, Any]:
    """The validation curve of a run, its best value, and its median training speed."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = [(record["step"], record["bits_per_byte"]) for record in records if record["event"] == "evaluation"]
    rates = [record["rate"] for record in records if record["event"] == "train"]
    return {
        "curve": curve,
        "best": min(value for _, value in curve),
        "last": curve[-1][1],
        "steps": curve[-1][0],
        "rate": statistics.median(rates),
    }


# ---------------------------------------------------------------------------------------------------- reporting
def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % interval."""
    return statistics.mean(values), T_QUANTILE[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def report(out: Path, results: dict[str, list[dict[str, Any]]], length: str) -> str:
    """Writes the table and the plot; returns the table."""
    lines = [
        f"`rom train {length}`, {len(results['routed'])} seeds, validation bits per byte (mean ± 95 % interval)",
        "",
        "| model | best | at the end | bytes/s on one thread | best of each seed |",
        "|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        best, last = (mean_and_interval([run[key] for run in runs]) for key in ("best", "last"))
        each = ", ".join(f"{run['best']:.4f}" for run in runs)
        rate = statistics.mean(run["rate"] for run in runs)
        lines.append(
            f"| {variant} | {best[0]:.4f} ± {best[1]:.4f} | {last[0]:.4f} ± {last[1]:.4f} | {rate:,.0f} | {each} |"
        )
    paired = [routed["best"] - dense["best"] for routed, dense in zip(results["routed"], results["dense"])]
    mean, half = mean_and_interval(paired)
    verdict = (
        "the interval holds 0: no difference shown"
        if abs(mean) <= half
        else ("routing is better" if mean < 0 else "the dense twin is better")
    )
    lines += ["", f"routed − dense, paired by seed: {mean:+.4f} ± {half:.4f} bits per byte ({verdict})."]
    table = "\n".join(lines)
    (out / "dense_vs_routed.md").write_text(table + "\n", encoding="utf-8")
    with (out / "dense_vs_routed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seed", "step", "bits_per_byte"])
        for variant, runs in results.items():
            writer.writerows([variant, seed, *point] for seed, run in enumerate(runs) for point in run["curve"])
    plot(out / "dense_vs_routed.png", results)
    return table


def plot(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """The mean curve of each variant in its interval. Runs by the clock differ in steps: their curves go by tenths."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for variant, runs in results.items():
        points = [mean_and_interval(values) for values in zip(*([value for _, value in run["curve"]] for run in runs))]
        steps = [statistics.mean(step) for step in zip(*([step for step, _ in run["curve"]] for run in runs))]
        low, high = [mean - half for mean, half in points], [mean + half for mean, half in points]
        axes.fill_between(steps, low, high, color=COLOURS[variant], alpha=0.15, linewidth=0)
        axes.plot(steps, [mean for mean, _ in points], color=COLOURS[variant], marker="o", markersize=3, label=variant)
    axes.set(xlabel="step", ylabel="validation bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
