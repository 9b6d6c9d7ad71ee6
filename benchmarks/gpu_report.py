"""One command for a machine with an NVIDIA GPU: build, GPU tests, sanitizer, every benchmark.

    python benchmarks/gpu_report.py --out results/                   all parts
    python benchmarks/gpu_report.py --out results/ --parts tests,scan

Needs no network: the package is built with what is installed, for the visible GPU only. Every part is made of steps;
what a step found is in OUT as soon as it ends (report.jsonl a line per step, NAME.jsonl a line per measured row, logs),
so a run that is cut short keeps everything before the cut. Copy the folder to benchmarks/results/<gpu>/ and enter its
figures in benchmarks/results/README.md.

Exit code: 0 if no step failed, 1 if one did, 2 for wrong arguments. Without a GPU every step is skipped, says so, and
the code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import commit

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
PART_SECONDS = 240


@dataclass(frozen=True)
class Step:
    """A command of a part, and why it cannot run here (empty: it can)."""

    name: str
    command: Sequence[str]
    environment: tuple[tuple[str, str], ...] = ()
    # `python -m pytest` puts its folder on the path, and the root holds unbuilt sources.
    folder: Path = ROOT / "tests"
    unavailable: str = ""


@dataclass
class Outcome:
    """A line of report.jsonl."""

    part: str
    step: str
    status: str  # passed, failed, timeout, skipped
    seconds: float
    reason: str
    gpu: str
    commit: str


def visible_gpu() -> tuple[str, str]:
    """(name, CMake architecture) of the GPU torch sees; empty strings without one."""
    import torch

    if not torch.cuda.is_available():
        return "", ""
    major, minor = torch.cuda.get_device_capability()
    # 90a: the architecture-specific instructions of Hopper (wgmma, setmaxnreg).
    return torch.cuda.get_device_name(), f"{major}{minor}{'a' if major >= 9 else ''}-real"


def find_sanitizer() -> str | None:
    """compute-sanitizer's path, or None."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def pytest(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *arguments]


def parts(out: Path, architecture: str) -> dict[str, list[Step]]:
    """All parts in the order they run."""
    sanitizer = find_sanitizer()
    nvcc = "" if shutil.which("nvcc") else "nvcc is not on PATH; Triton serves the GPU"
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", str(ROOT)]
    build = (("ROM_CUDA", "on"), ("ROM_CUDA_ARCHS", architecture))
    found = {
        "build": [Step("install", install, build, ROOT, nvcc)],
        "tests": [Step("pytest", pytest())],
        "sanitizer": [
            Step(
                tool,
                # 40 000 rows take minutes under a sanitizer and go where 33 rows went.
                [sanitizer or "", "--tool", tool, "--error-exitcode", "9", *pytest("ops", "-k", "cuda and not 40000")],
                # Otherwise torch's allocator hides accesses behind the end of a tensor.
                (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
                unavailable="" if sanitizer else "compute-sanitizer is not on PATH nor in /usr/local/cuda/bin",
            )
            for tool in ("memcheck", "racecheck", "synccheck")
        ],
    }
    for name, variants in BENCHMARKS.items():
        found[name] = [_benchmark(name, label, arguments, out) for label, arguments in variants.items()]
    return found


# Every benchmark here, cut into steps that fit a part.
BENCHMARKS: dict[str, dict[str, list[str]]] = {
    "norm": {"norm": ["--shape", "16384,2048"]},
    "scan": {kind: [f"--{kind}"] for kind in ("forward", "backward", "decode")},
    "block": {"block": []},
}


def _benchmark(name: str, label: str, arguments: Sequence[str], out: Path) -> Step:
    files = {"--json": f"{name}.jsonl", "--markdown": f"{name}_{label}.md", "--plot": f"{name}_{label}.png"}
    outputs = [part for option, file in files.items() for part in (option, str(out / file))]
    script = str(ROOT / "benchmarks" / f"bench_{name}.py")
    return Step(label, [PYTHON, script, "--device", "cuda", "--targets", *arguments, *outputs])


def run(part: str, step: Step, out: Path, limit: float, gpu: str) -> Outcome:
    """Runs a step, its output going to OUT/<part>_<step>.log; appends the outcome to OUT/report.jsonl."""
    start, reason = time.perf_counter(), step.unavailable if gpu else "no NVIDIA GPU is visible to torch"
    status = "skipped" if reason else "failed"
    if not reason:
        with open(out / f"{part}_{step.name}.log", "w") as log:
            try:
                command = subprocess.run(
                    step.command, cwd=step.folder, env=os.environ | dict(step.environment),
                    stdout=log, stderr=subprocess.STDOUT, timeout=max(limit, 1), check=False,
                )  # fmt: skip
                status = "failed" if command.returncode else "passed"
                reason = f"exit code {command.returncode}: see {log.name}" if command.returncode else ""
            except subprocess.TimeoutExpired:
                status, reason = "timeout", f"cut off after {limit:.0f} s: see {log.name}"
    outcome = Outcome(part, step.name, status, round(time.perf_counter() - start, 1), reason, gpu, commit())
    with open(out / "report.jsonl", "a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")
    print(f"{part:10} {step.name:10} {status:8} {outcome.seconds:6.1f} s  {reason}", flush=True)
    return outcome


def write_summary(out: Path, outcomes: Sequence[Outcome]) -> None:
    """OUT/report.md: the steps, then the tables of the benchmarks."""
    lines = ["| part | step | status | seconds | reason |", "|---|---|---|---|---|"]
    lines += [f"| {o.part} | {o.step} | {o.status} | {o.seconds} | {o.reason} |" for o in outcomes]
    tables = [path.read_text() for path in sorted(out.glob("*.md")) if path.name != "report.md"]
    (out / "report.md").write_text("\n".join(lines) + "\n\n" + "\n".join(tables))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(parts(Path(), ""))
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is found")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--part-seconds", type=float, default=PART_SECONDS, help="a part is cut off here (default 240)")
    options = parser.parse_args(argv)
    if unknown := set(options.parts.split(",")) - set(names):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    gpu, architecture = visible_gpu()
    print(f"GPU: {gpu or 'none; every step is skipped'} {architecture}", flush=True)
    outcomes = []
    for part in options.parts.split(","):
        stop = time.perf_counter() + options.part_seconds
        for step in parts(out, architecture)[part]:
            outcomes.append(run(part, step, out, stop - time.perf_counter(), gpu))
            write_summary(out, outcomes)
    return int(any(outcome.status in ("failed", "timeout") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
