"""What binds every kernel: one launch each under Nsight Compute, at the benchmark's size.

    python benchmarks/profile_kernels.py --family scan --backend cuda --out FOLDER

Writes FOLDER/profile_FAMILY_BACKEND.csv (all metrics of ncu's sections) and .md: duration, issue slots, pipes (xu is
MUFU), DRAM, registers, occupancy, and what warps wait for. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
    "LaunchStats", "Occupancy",
)  # fmt: skip
PIPE = r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active"
STALL = r"smsp__average_warps?_issue_stalled_(\w+)_per_issue_active\.ratio"
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
HEADS = ("kernel", "µs", "issue slots %", "pipes %", "DRAM %", "registers", "occupancy %", "warps wait for")


def command(family: str, backend: str, log: Path) -> list[str]:
    sections = [part for name in SECTIONS for part in ("--section", name)]
    output = ["--page", "raw", "--csv", "--log-file", str(log)]
    profiler = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    launches = str(Path(__file__).with_name("launches.py"))
    return [*profiler, *sections, *output, sys.executable, launches, "--large", "--family", family,
            "--backend", backend]  # fmt: skip


def read(log: Path) -> tuple[list[dict[str, str]], dict[str, str], list[str]]:
    """(a dictionary per launch, the units, ncu's own messages) from the raw page: names, units, then launches."""
    lines = log.read_text(errors="replace").splitlines()
    messages = [line for line in lines if line.startswith("==")]
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))
    return rows[1:], rows[0] if rows else {}, messages


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except (AttributeError, ValueError):
        return None


def _first(row: dict[str, str], pattern: str) -> float | None:
    return next(
        (n for name, text in row.items() if re.search(pattern, name) and (n := _number(text)) is not None), None
    )


def _largest(row: dict[str, str], pattern: str, how_many: int) -> str:
    """The largest of the metrics that match, by the group of the pattern."""
    found: dict[str, float] = {}
    for name, text in row.items():
        if (match := re.fullmatch(pattern, name)) and (value := _number(text)) is not None:
            found[match[1]] = max(value, found.get(match[1], 0))
    best = sorted(found.items(), key=lambda item: -item[1])[:how_many]
    return ", ".join(f"{name} {value:.3g}" for name, value in best)


def summary(row: dict[str, str], units: dict[str, str]) -> list[str]:
    """The cells of HEADS; empty where this version of ncu has no such metric."""
    duration = _first(row, r"^gpu__time_duration\.sum$")
    issued = _first(row, r"^smsp__issue_active\.avg\.per_cycle_active$")
    figures = (
        duration and duration * MICROSECONDS.get(units.get("gpu__time_duration.sum", "us"), 1),
        issued and 100 * issued,
        _first(row, r"dram_+throughput\.avg\.pct"),
        _first(row, r"^launch__registers_per_thread$"),
        _first(row, r"^sm__warps_active\.avg\.pct"),
    )
    time, issue, dram, registers, occupancy = ("" if figure is None else f"{figure:.4g}" for figure in figures)
    name = re.sub(r"\(.*", "", row.get("Kernel Name", "")).replace("|", "/")
    return [name, time, issue, _largest(row, PIPE, 4), dram, registers, occupancy, _largest(row, STALL, 3)]


def table(rows: Sequence[dict[str, str]], units: dict[str, str]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    return "\n".join(lines + ["| " + " | ".join(summary(row, units)) + " |" for row in rows]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="of launches.py")
    parser.add_argument("--backend", required=True, help="cuda or triton")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if shutil.which("ncu") is None:
        parser.error("ncu is not on PATH")
    log = options.out / f"profile_{options.family}_{options.backend}.csv"
    code = subprocess.run(command(options.family, options.backend, log), check=False).returncode
    rows, units, messages = read(log) if log.exists() else ([], {}, [])
    print("\n".join(messages))
    text = f"## {options.family}, {options.backend}, under Nsight Compute\n\n{table(rows, units)}"
    print(text)
    if rows:
        log.with_suffix(".md").write_text(text)
    return code or int(not rows)


if __name__ == "__main__":
    sys.exit(main())
