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
from checkout import commit
from timing import Clock

import rom
from rom import native


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
    """What one thread of this machine reached, or what one GPU issues at its highest clock; a second's worth."""

    multiply_adds: float
    exps: float
    bandwidth: float

    def describe(self, device: str) -> str:
        """The figures and how they were found."""
        if device == "cuda":
            how, multiply, exp = "one GPU", "128 instructions per SM and clock", "16 per SM and clock"
        else:
            how, multiply, exp = "one thread", "float32 matmul 768³", "torch.exp on 16 Ki values in cache"
        return (
            f"{'Peaks' if device == 'cuda' else 'Measured peaks'}, {how}: {self.multiply_adds / 1e9:.1f} G "
            f"multiply-adds/s ({multiply}), {self.exps / 1e9:.2f} G exp/s ({exp}), {self.bandwidth / 1e9:.1f} GB/s "
            f"({'measured ' if device == 'cuda' else ''}copy, reads + writes)."
        )


def _best(call: Callable[[], object], clock: Clock, seconds: float = 0.3) -> float:
    """The fastest of the calls that fit into `seconds`: a peak is a best case."""
    clock.time(call)
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        best = min(best, clock.time(call))
    return best


def measure_peak(device: str) -> Peak:
    """Measures this machine with torch alone: a multiply-add is half a matmul FLOP, a copied byte counts twice.

    A GPU's instruction rates follow from its clock and processors; its memory is measured.
    """
    threads, clock = torch.get_num_threads(), Clock(device)
    torch.set_num_threads(1)
    try:
        source = torch.zeros(2**26 if device == "cpu" else 2**28, device=device)
        target = torch.zeros_like(source)
        bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), clock)
        if device == "cuda":
            issued = 128 * torch.cuda.get_device_properties(0).multi_processor_count * _highest_clock()
            return Peak(issued, issued / 8, bandwidth)
        a, b = torch.randn(768, 768), torch.randn(768, 768)
        multiply_adds = 768**3 / _best(lambda: torch.mm(a, b), clock)
        x = torch.randn(2**14)
        exps = x.numel() / _best(lambda: torch.exp(x, out=target[: 2**14]), clock)
    finally:
        torch.set_num_threads(threads)
    return Peak(multiply_adds, exps, bandwidth)


def _highest_clock() -> float:
    """Hz of the GPU's processors at boost, by torch or, where it does not tell, by nvidia-smi."""
    kilohertz = getattr(torch.cuda.get_device_properties(0), "clock_rate", None)
    if kilohertz:
        return 1e3 * float(kilohertz)
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return 1e6 * float(answer.split()[0])
