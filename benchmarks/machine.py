"""The machine under a benchmark: its name for the header, and what it could do at best for the floors."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Clock

import rom
from rom import native


def commit() -> str:
    """The checkout's commit, with + if files differ from it; `unknown` outside git."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout else "")


def processor() -> str:
    """The CPU's marketing name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_average() -> str:
    """Programs waiting for a core over the last minute, to judge a wall-clock time by."""
    return f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "unknown"


def header(device: str) -> dict[str, str]:
    """What a reader must know to compare two tables."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} ({native.cpu_isa()})"
    return {
        "device": name,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "rom": rom.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": load_average(),
    }


@dataclass(frozen=True)
class Peak:
    """What this machine reached, one thread (or one GPU), in operations and bytes per second."""

    multiply_adds: float
    exps: float
    bandwidth: float

    def describe(self, device: str) -> str:
        """The figures and how they were measured."""
        how = "one GPU" if device == "cuda" else "one thread"
        exp = "16 per SM and clock" if device == "cuda" else "torch.exp on 16 Ki values in cache"
        return (
            f"Measured peaks, {how}: {self.multiply_adds / 1e9:.1f} G multiply-adds/s (float32 matmul 768³), "
            f"{self.exps / 1e9:.2f} G exp/s ({exp}), {self.bandwidth / 1e9:.1f} GB/s (copy, reads + writes)."
        )


def _best(call: Callable[[], object], clock: Clock, seconds: float = 0.3) -> float:
    """The fastest of the calls that fit into `seconds`: a peak is a best case."""
    clock.time(call)
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        best = min(best, clock.time(call))
    return best


def measure_peak(device: str) -> Peak:
    """Measures this machine with torch alone: a multiply-add is half a matmul FLOP, a copied byte counts twice."""
    threads, clock = torch.get_num_threads(), Clock(device)
    torch.set_num_threads(1)
    try:
        n = 768 if device == "cpu" else 8192
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        multiply_adds = n**3 / _best(lambda: torch.mm(a, b), clock)
        source = torch.zeros(2**26, device=device)
        target = torch.zeros_like(source)
        bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), clock)
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            exps = 16e3 * properties.multi_processor_count * properties.clock_rate
        else:
            x = torch.randn(2**14)
            exps = x.numel() / _best(lambda: torch.exp(x, out=target[: 2**14]), clock)
    finally:
        torch.set_num_threads(threads)
    return Peak(multiply_adds, exps, bandwidth)
