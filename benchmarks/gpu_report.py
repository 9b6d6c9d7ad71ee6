"""One command for a machine with an NVIDIA GPU: build, GPU tests, sanitizer, every benchmark and peer, profiles.

    python benchmarks/gpu_report.py --out results/                        all parts, the most telling ones first
    python benchmarks/gpu_report.py --out results/ --parts tests,scan
    python benchmarks/gpu_report.py --out results/ --minutes 9.5          stops there; the same command goes on

Needs no network: the package is built with what is installed, for the visible GPU only, and the peers from --peers, a
folder with their source distributions (see build_peers.py). A part takes at most four minutes and is made of steps.
What a step found is in OUT as soon as it ends (report.jsonl a line per step, NAME.jsonl a line per measured case,
logs), so a run that is cut short keeps everything before the cut. A step that ended in an earlier run, from the same
source and on the same kind of GPU, is not repeated. docs/benchmarks.md says what every file is and where it goes.

Exit code: 0 if no step failed, 1 if one did, 2 for wrong arguments. Without a GPU every step is skipped, says so, and
the code is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkout import commit
from steps import JOURNAL, Journal, Step, run_part, unpack

ROOT = Path(__file__).parent.parent
BENCHMARKS_FOLDER = ROOT / "benchmarks"
# `python -m pytest` puts its folder on the path, and the root holds unbuilt sources.
TESTS = ROOT / "tests"
PYTHON = sys.executable
PART_SECONDS = 240
CUDA_BIN = "/usr/local/cuda/bin"  # looked into after PATH
# What a machine says that runs programs on the GPU but lets no tool look into it.
NO_SANITIZER = r"Device not supported.*|Unable to find injection library.*"
NO_COUNTERS = r"ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to (initialize the profiler|prepare kernel).*"

# Every benchmark here, cut into steps that fit a part.
BENCHMARKS: dict[str, dict[str, list[str]]] = {
    "norm": {"norm": ["--shape", "16384,2048"]},
    "scan": {kind: [f"--{kind}"] for kind in ("forward", "backward", "decode")},
    "conv": {kind: [f"--{kind}"] for kind in ("forward", "backward", "update")},
    "block": {"block": []},
    "orthogonal": {kind: [f"--{kind}"] for kind in ("square", "tall")},
    "last_layer": {"last_layer": []},
    "faults": {part: ["--part", part] for part in ("gemm", "campaigns", "restart")},
}
FAMILIES = ("scan", "decode", "conv", "norm", "routing", "orthogonal")  # of launches.py, which needs the built package
# By what a first run must know; benchmarks not named come last.
ORDER = ("build", "tests", "peers", "scan", "micro", "conv", "train", "sanitizer", "profile")


def visible_gpu() -> tuple[str, str]:
    """(name, CMake architecture) of the GPU torch sees; empty strings without one."""
    import torch

    if not torch.cuda.is_available():
        return "", ""
    major, minor = torch.cuda.get_device_capability()
    # 90a: the architecture-specific instructions of Hopper (wgmma, setmaxnreg).
    return torch.cuda.get_device_name(), f"{major}{minor}{'a' if major >= 9 else ''}-real"


def missing(tool: str) -> str:
    """Why a step that needs `tool` cannot run; empty if it can."""
    return "" if shutil.which(tool) else f"{tool} is neither on PATH nor in {CUDA_BIN}"


# ------------------------------------------------------------------------------------------------ the parts
def build_part(architecture: str) -> list[Step]:
    """Without nvcc Triton alone serves the GPU."""
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", str(ROOT)]
    environment = (("ROM_CUDA", "off" if missing("nvcc") else "on"), ("ROM_CUDA_ARCHS", architecture))
    return [Step("install", install, ROOT, environment, kept=False)]


def tests_part() -> list[Step]:
    """One line per test, so that a cut-off log shows how far it came."""
    pytest = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):  # launches and compilers wait for a core, not for the GPU
        pytest += ["-n", "8", "--dist", "worksteal"]
    return [Step("pytest", pytest, TESTS)]


def sanitizer_part() -> list[Step]:
    """Small launches of every kernel; without torch's caching, which hides accesses behind the end of a tensor."""
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    tool = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    launches = [PYTHON, str(BENCHMARKS_FOLDER / "launches.py")]
    why = missing("compute-sanitizer")
    return [
        Step(name, [*tool, name, *launches], TESTS, environment, why, NO_SANITIZER)
        for name in ("memcheck", "racecheck", "synccheck")
    ]


def profile_part(out: Path) -> list[Step]:
    """Steps by family and backend: ncu writes when it ends, so a cut-off loses all of its step."""
    script = str(BENCHMARKS_FOLDER / "profile_kernels.py")

    def step(family: str, backend: str, weight: float) -> Step:
        command = [PYTHON, script, "--family", family, "--backend", backend, "--out", str(out)]
        return Step(f"{family}_{backend}", command, TESTS, (), missing("ncu"), NO_COUNTERS, weight)

    return [
        step(family, backend, 2 if family == "scan" else 1) for backend in ("cuda", "triton") for family in FAMILIES
    ]


def peers_part(out: Path, sdists: Path | None) -> list[Step]:
    """A peer that cannot be built is named as missing by the benchmarks."""
    command = [PYTHON, str(BENCHMARKS_FOLDER / "build_peers.py"), "--sdists", str(sdists), "--out", str(out / "peers")]
    why = "" if sdists else "--peers gives no folder with source distributions"
    load = "import torch, selective_scan_cuda, causal_conv1d; print(selective_scan_cuda.__file__)"
    path = _peers_path(out)
    return [
        Step("compile", command, TESTS, unavailable=why, weight=9, kept=False),
        Step("import", [PYTHON, "-c", load], TESTS, path, why, kept=False),
    ]


def micro_part(out: Path) -> list[Step]:
    script = str(BENCHMARKS_FOLDER / "micro/measure.py")
    files = ["--json", str(out / "micro.jsonl"), "--markdown", str(out / "micro.md")]
    return [Step("micro", [PYTHON, script, *files], TESTS, unavailable=missing("nvcc"))]


def train_part(out: Path) -> list[Step]:
    script = str(BENCHMARKS_FOLDER / "train_curves.py")
    files = ["--json", str(out / "train.jsonl"), "--markdown", str(out / "train.md"), "--plot", str(out / "train.png")]
    return [Step("curves", [PYTHON, script, "--device", "cuda", *files], TESTS)]


def benchmark_part(name: str, out: Path) -> list[Step]:
    script = str(BENCHMARKS_FOLDER / f"bench_{name}.py")

    def step(label: str, arguments: Sequence[str]) -> Step:
        stem = name if label == name else f"{name}_{label}"
        files = ["--json", f"{name}.jsonl", "--markdown", f"{stem}.md", "--plot", f"{stem}.png"]
        outputs = [part if part.startswith("--") else str(out / part) for part in files]
        return Step(label, [PYTHON, script, "--device", "cuda", "--targets", *arguments, *outputs], TESTS,
                    _peers_path(out))  # fmt: skip

    return [step(label, arguments) for label, arguments in BENCHMARKS[name].items()]


def _peers_path(out: Path) -> tuple[tuple[str, str], ...]:
    before = os.environ.get("PYTHONPATH")
    return (("PYTHONPATH", f"{out / 'peers'}{os.pathsep + before if before else ''}"),)


def parts(out: Path, architecture: str, peers: Path | None) -> dict[str, list[Step]]:
    """All parts in the order they run."""
    found = {
        "build": build_part(architecture),
        "tests": tests_part(),
        "peers": peers_part(out, peers),
        "micro": micro_part(out),
        "train": train_part(out),
        "sanitizer": sanitizer_part(),
        "profile": profile_part(out),
        **{name: benchmark_part(name, out) for name in BENCHMARKS},
    }
    first = {name: found[name] for name in ORDER if name in found}
    return {**first, **found}


# ------------------------------------------------------------------------------------------------ the run
def arguments(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is found")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--part-seconds", type=float, default=PART_SECONDS, help="a part is cut off here (default 240)")
    parser.add_argument("--minutes", type=float, help="stop here; the rest is for the next run (default: no limit)")
    parser.add_argument("--again", action="store_true", help="also repeat what an earlier run has done")
    parser.add_argument("--peers", type=Path, help="folder with the source distributions of mamba_ssm, causal_conv1d")
    parser.add_argument("--archive", type=Path, metavar="FILE.tar.gz",
                        help="after every step the results in one file; unpacked first if OUT is empty")  # fmt: skip
    parser.add_argument("--commit", default=commit(), help="commit of a copy without .git")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    start = time.perf_counter()
    if CUDA_BIN not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + CUDA_BIN
    names = list(parts(Path(), "", None))
    parser = arguments(names)
    options = parser.parse_args(argv)
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.peers and not options.peers.is_dir():
        parser.error(f"--peers {options.peers} is no folder")
    out, archive = options.out.resolve(), options.archive and options.archive.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if archive and archive.exists() and not (out / JOURNAL).exists():
        unpack(archive, out)
    gpu, architecture = visible_gpu()
    print(f"GPU: {gpu or 'none; every step is skipped'} {architecture}", flush=True)
    journal = Journal(out, gpu, options.commit, archive)
    earlier, end = len(journal.outcomes), start + 60 * (options.minutes or float("inf"))
    steps = parts(out, architecture, options.peers and options.peers.resolve())
    for part in wanted:
        stop = min(time.perf_counter() + options.part_seconds, end)
        run_part(part, steps[part], journal, stop, options.again)
    return int(any(outcome.status in ("failed", "timeout") for outcome in journal.outcomes[earlier:]))


if __name__ == "__main__":
    sys.exit(main())
