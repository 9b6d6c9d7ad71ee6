"""Who runs an operator, and why not somebody else.

Every operator has up to four implementations: `cuda` (native, NVIDIA), `triton` (any Triton GPU), `cpu` (native) and
`reference` (plain torch, any device). The fastest one that can take a call runs it; `with rom.backend(name):` and the
environment variable ROM_BACKEND choose another, `strict` forbids falling back to something slow.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rom import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS, "strict")
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


class BackendError(RuntimeError):
    """The chosen backend cannot run this call; the message says why and what to do."""


class FallbackWarning(UserWarning):
    """An operator runs on a backend much slower than the device allows."""


@dataclass(frozen=True)
class Implementation:
    """One operator on one backend."""

    op: str
    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    kernels: tuple[str, ...]  # native kernels it calls: it is unavailable where one is missing
    module: str | None  # Triton module it launches from
    shared_bytes: int  # shared memory per block its CUDA kernels ask for


@dataclass(frozen=True)
class BackendStatus:
    """A row of `rom.backends()`: whether `backend` can run `op` on this machine, and the reason if not."""

    op: str
    backend: str
    available: bool
    reason: str


_implementations: dict[str, dict[str, Implementation]] = {}
_choice: list[str] = []  # the stack of `with rom.backend(...)`
_warned: set[tuple[str, str]] = set()


def register(
    op: str,
    backend: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    kernels: tuple[str, ...] = (),
    module: str | None = None,
    shared_bytes: int = 0,
) -> None:
    """Declares that `backend` implements `op` (called by the operator's own file)."""
    declared = Implementation(op, backend, forward, backward, kernels, module, shared_bytes)
    _implementations.setdefault(op, {})[backend] = declared


def implementation(op: str, backend: str) -> Implementation:
    """The implementation that `choose` named."""
    return _implementations[op][backend]


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _unavailable(op: str, backend: str) -> str:
    """Why this machine cannot run `op` on `backend`; empty if it can. It does not change while the process lives."""
    if backend not in BACKENDS:
        raise ValueError(f"rom: expected a backend of {', '.join(CHOICES)}, got {backend!r}.")
    found = _implementations[op].get(backend)
    if found is None:
        return f"{op} has no {backend} kernel in this release"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; `pip install 'rom-kernels[triton]'`"
        return "" if torch.cuda.is_available() or _interpreted() else "no GPU is visible"
    if backend == "cuda" and (reason := _no_cuda(found.shared_bytes)):
        return reason
    missing = [kernel for kernel in found.kernels if not native.has(kernel, backend)]
    return f"the native module lacks {', '.join(missing)}" if missing else ""


def _no_cuda(shared_bytes: int) -> str:
    """Why CUDA kernels that ask for so much shared memory per block cannot run here, on every visible GPU."""
    if native.CUDA_REASON:
        return f"{native.CUDA_REASON}; rebuild with nvcc on PATH or ROM_CUDA=pip"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        if gpu.major < 8:
            return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, the kernels are built for 8.0 and later"
        found: int = getattr(gpu, "shared_memory_per_block_optin", shared_bytes)  # torch's stubs do not know it
        if found < shared_bytes:
            return f"{gpu.name} has {found >> 10} KiB of shared memory per block, the kernels need {shared_bytes >> 10}"
    return ""


def _wanted() -> str:
    choice = _choice[-1] if _choice else os.environ.get("ROM_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"rom: ROM_BACKEND={choice!r}: expected one of {', '.join(CHOICES)}.")
    return choice


def _warn_once(op: str, backend: str, reason: str) -> None:
    if (op, backend) not in _warned:
        _warned.add((op, backend))
        warnings.warn(
            f"rom.ops.{op} runs on the slow `{backend}` backend: {reason}. `rom doctor` lists the backends; "
            f"`with rom.backend({backend!r}):` accepts this silently.",
            FallbackWarning,
            stacklevel=4,
        )


def choose(op: str, device_type: str, refusals: tuple[tuple[str, str], ...] = ()) -> str:
    """The backend that runs this call of `op`; under torch.compile the choice is made once, while tracing.

    `refusals` are pairs (backend, reason) the operator adds for this call: ("cpu", "complex A is not supported").
    """
    order = _ORDER.get(device_type, ("reference",))
    wanted = _wanted()
    if wanted not in BACKENDS and not refusals and order[0] != "reference" and not _unavailable(op, order[0]):
        return order[0]  # nearly every call: 1.1 us instead of 2.4; a decode step on a CPU takes 50
    refused = dict(refusals)

    def reason(backend: str) -> str:
        on_cpu = backend == "triton" and _interpreted()
        if backend not in order and not on_cpu:
            return f"the tensors are on {device_type}"
        return _unavailable(op, backend) or refused.get(backend, "")

    if wanted in BACKENDS:
        if why := reason(wanted):
            raise BackendError(
                f"rom.ops.{op}: backend {wanted!r} was chosen but cannot run this call: {why}. "
                f"Choose another with rom.backend(...) or ROM_BACKEND, or `auto`."
            )
        return wanted
    reasons = {}
    for backend in order:
        why = reason(backend)
        if not why:
            break
        reasons[backend] = why
    text = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if backend == "reference" and device_type in _ORDER:
        if wanted == "strict":
            raise BackendError(f"rom.ops.{op}: under `strict` the slow reference backend is refused. {text}.")
        _warn_once(op, backend, text)
    return backend


# What @torch.compiler.assume_constant_result does, without its import of the whole compiler: 1 s of `import rom`.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backends() -> list[BackendStatus]:
    """Every operator × backend on this machine, with the reason where one is unavailable.

    >>> import rom
    >>> [row.available for row in rom.backends() if row.op == "selective_scan" and row.backend == "cpu"]
    [True]
    """
    rows = []
    for op in sorted(_implementations):
        for backend in BACKENDS:
            why = _unavailable(op, backend)
            rows.append(BackendStatus(op, backend, not why, why))
    return rows


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses who runs the operators inside the `with` block (process-wide, like ROM_BACKEND).

    name: `auto`, `cuda`, `triton`, `cpu`, `reference`, or `strict` (auto, but never the slow reference). A choice that
    cannot run a call is a `BackendError` at that call. Gradients run on the backend of their forward.

    >>> with rom.backend("reference"):
    ...     y, _ = rom.ops.add_rms_norm(torch.ones(2, 4), torch.ones(4))
    """
    if name not in CHOICES:
        raise ValueError(f"rom.backend: expected one of {', '.join(CHOICES)}, got {name!r}.")
    _choice.append(name)
    try:
        yield
    finally:
        _choice.pop()
