"""What `rom doctor` finds out: machine, versions, native modules, backends and why not, a run of every operator.

Every probe is guarded: a report must come out of a broken installation above all.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import rom
from rom import native

PACKAGES = ("torch", "numpy", "triton", "safetensors", "transformers", "matplotlib", "tqdm")
VARIABLES = (
    "ROM_BACKEND",
    "ROM_MAX_CPU_ISA",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
)
TOLERANCE = 1e-4  # of the smoke runs, float32; TF32 is switched off around them
Report = dict[str, Any]


def guarded(probe: Callable[[], Any]) -> Any:
    """The probe's answer, or a sentence saying why there is none."""
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def examine() -> Report:
    """The whole report, of plain values (JSON). `problems` lists what is broken; empty is healthy.

    >>> from rom import doctor
    >>> doctor.examine()["problems"]
    []
    """
    report: Report = {
        "machine": guarded(_machine),
        "versions": guarded(_versions),
        "gpus": guarded(_gpus),
        "native": guarded(_native),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "backends": guarded(lambda: [vars(row) for row in rom.backends()]),
        "smoke": guarded(smoke),
    }
    report["problems"] = _problems(report)
    return report


def _machine() -> Report:
    memory = guarded(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1))
    return {
        "system": platform.platform(),
        "cpu": guarded(_cpu_name),
        "instruction set": native.cpu_isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GiB": memory,
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> Report:
    versions: Report = {"python": sys.version.split()[0], "rom": rom.__version__, "rom ABI": native.ABI_VERSION}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _gpus() -> list[Report]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory GiB": round(properties.total_memory / 2**30, 1),
                "driver": guarded(_driver),
                "torch CUDA": torch.version.cuda,
            }
        )
    return found


def _driver() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _native() -> Report:
    return {
        "package": str(os.path.dirname(rom.__file__)),
        "rom._C": native._cpu.__file__,
        "rom._C_cuda": native.CUDA_REASON or native._cuda.__file__,
        "other packages named rom": guarded(_foreign),
    }


def _foreign() -> list[str]:
    """Distributions that install a `rom` of their own: on the package index, `rom` is a mapper for Redis."""
    owners = set(importlib.metadata.packages_distributions().get("rom", ()))
    return sorted(f"{name} {importlib.metadata.version(name)}" for name in owners if name != "rom-kernels")


def _problems(report: Report) -> list[str]:
    problems = [f"{name}: {value}" for name, value in report.items() if isinstance(value, str)]
    if isinstance(report["native"], dict) and report["native"]["other packages named rom"]:
        foreign = report["native"]["other packages named rom"]
        problems.append(
            f"another package also installs `rom`: {foreign}. Uninstall one of the two, then reinstall rom."
        )
    if isinstance(report["smoke"], list):
        problems += [f"{s['op']} on {s['backend']}: {s['result']}" for s in report["smoke"] if s["result"] != "ok"]
    return problems


# ------------------------------------------------------------------------------------------------ smoke runs
def _values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.5


def _scan_arguments() -> Report:
    options = {"D": _values(6), "z": _values(2, 9, 6), "delta_bias": _values(6), "delta_softplus": True}
    return {"u": _values(2, 9, 6), "delta": _values(2, 9, 6), "A": -torch.rand(6, 4) - 0.5, **_b_and_c(9), **options}


def _update_arguments() -> Report:
    values = {"u": _values(2, 6), "delta": _values(2, 6), "A": -torch.rand(6, 4) - 0.5}
    return {"state": torch.randn(2, 6, 4), **values, "B": _values(2, 4), "C": _values(2, 4), "delta_softplus": True}


def _b_and_c(length: int) -> Report:
    return {"B": _values(2, length, 4), "C": _values(2, length, 4)}


def _routed_linear_arguments() -> Report:
    with rom.backend("reference"):
        routing = rom.ops.route(_values(7, 3), 2)
    return {"x": _values(7, 5), "weight": _values(3, 4, 5), "routing": routing, "weighted": True}


def _sites(target: rom.faults.Target) -> np.ndarray:
    """A sign wrong for one sample."""
    return rom.faults.sites(target, rom.faults.flip(1 << 31), sample=1, k=0, col=2)


#: op -> small arguments for it. Floating tensors get gradients, except the states that are updated in place.
ARGUMENTS: dict[str, Callable[[], Report]] = {
    "add_rms_norm": lambda: {"x": _values(5, 8), "weight": _values(8), "residual": _values(5, 8)},
    "causal_conv1d": lambda: {"x": _values(2, 9, 6), "weight": _values(6, 4), "bias": _values(6), "activation": "silu"},
    "causal_conv1d_update": lambda: {"x": _values(2, 6), "conv_state": _values(2, 6, 4), "weight": _values(6, 4)},
    "cayley": lambda: {"x": _values(2, 9, 4)},
    "householder": lambda: {"x": _values(2, 9, 4)},
    "logit_flips": lambda: {"logits": _values(5, 3), "labels": torch.arange(5) % 3},
    "orthogonal_apply": lambda: {"x": _values(2, 9, 4), "inp": _values(2, 4, 3)},
    "faulty_matmul": lambda: {"a": _values(5, 8), "b": _values(8, 4), "sites": _sites(rom.faults.Target.B)},
    "faulty_values": lambda: {"x": _values(5, 8), "sites": _sites(rom.faults.Target.OUTPUT)},
    "route": lambda: {"logits": _values(7, 3), "top_k": 2},
    "routed_linear": _routed_linear_arguments,
    "selective_scan": _scan_arguments,
    "selective_state_update": _update_arguments,
    "weight_flips": lambda: {"features": _values(5, 4), "weight": _values(3, 4), "labels": torch.arange(5) % 3},
}
IN_PLACE = {"causal_conv1d_update": "conv_state", "selective_state_update": "state"}


def smoke() -> list[Report]:
    """Runs every operator, forward and backward, on every available backend against the reference."""
    rows = []
    for status in rom.backends():
        if status.available and status.backend != "reference":
            result = guarded(partial(_compare, status.op, status.backend))
            rows.append({"op": status.op, "backend": status.backend, "result": result})
    return rows


def _compare(op: str, backend: str) -> str:
    device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        got, expected = (_run(op, name, device) for name in (backend, "reference"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    for name, value in got.items():
        error = (value - expected[name]).abs().max().item() / max(1.0, expected[name].abs().max().item())
        if not error <= TOLERANCE:
            return f"{name} differs from the reference by {error:.1e}"
    return "ok"


def _run(op: str, backend: str, device: str) -> dict[str, torch.Tensor]:
    """Outputs, gradients and updated states by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments = ARGUMENTS[op]()
    state = IN_PLACE.get(op)
    inputs = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(device)
        if isinstance(value, rom.Routing):
            arguments[name] = rom.Routing(*(field.to(device) for field in value))
        if isinstance(value, torch.Tensor) and value.is_floating_point() and state is None:
            inputs[name] = arguments[name].requires_grad_()
    with rom.backend(backend):
        out = getattr(rom.ops, op)(**arguments)
        fields = out if isinstance(out, tuple) else (out,)
        results = {f"output {i}": value.detach() for i, value in enumerate(fields)}
        differentiable = [value for value in fields if value.requires_grad]
        if differentiable:
            loss = sum((value * torch.cos(value.detach())).sum() for value in differentiable)
            gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
            results |= {f"{name}.grad": g for name, g in zip(inputs, gradients) if g is not None}
    return results | ({state: arguments[state]} if state else {})


# ------------------------------------------------------------------------------------------------ for people
def render(report: Report) -> str:
    """The report as text."""
    lines = []
    for section in ("machine", "versions", "native", "environment"):
        lines += _section(section, report[section])
    lines += _section("gpus", {str(i): gpu for i, gpu in enumerate(report["gpus"])} or "none visible to torch")
    lines.append("backends")
    results = {(s["op"], s["backend"]): s["result"] for s in report["smoke"] if isinstance(s, dict)}
    for row in report["backends"] if isinstance(report["backends"], list) else ():
        said = results.get((row["op"], row["backend"]), "available") if row["available"] else f"no: {row['reason']}"
        lines.append(f"  {row['op']:<24}{row['backend']:<11}{said}")
    if report["problems"]:
        return "\n".join([*lines, "problems", *(f"  {problem}" for problem in report["problems"])])
    return "\n".join([*lines, "no problems found"])


def _section(name: str, values: Any) -> list[str]:
    if not isinstance(values, dict):
        return [name, f"  {values}"]
    return [name, *(f"  {key:<24} {'-' if value in (None, []) else value}" for key, value in values.items())]
