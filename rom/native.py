"""The bridge to the native modules: loads them, checks their ABI number, passes tensors.

`rom._C` (CPU) must be there; `rom._C_cuda` is there when the package was built with nvcc. Both offer kernels as
functions of keyword arguments whose names are the fields of the structs in csrc/include/rom.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 2  # of csrc/include/rom/abi.h
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
}

_HERE = Path(__file__).parent
_REMEDY = "Run `pip install .` (or `pip install -e .` to work on the source) in the repository's root."


def _check(module: Any) -> None:
    found = getattr(module, "abi_version", None)
    if found != ABI_VERSION:
        raise ImportError(
            f"rom: {module.__file__} was built for ABI {found}, this Python code needs ABI {ABI_VERSION}: "
            f"the compiled kernels are stale. {_REMEDY}"
        )
    module.set_dtypes(DTYPE_CODES)


_cpu: Any
_cuda: Any = None
CUDA_REASON = ""  # why there are no CUDA kernels; empty if there are

try:
    _cpu = importlib.import_module("rom._C")
except ImportError as error:
    raise ImportError(
        f"rom was imported from {_HERE}, which holds no compiled kernels ({error}). If this is the source tree, "
        f"leave the directory or build it. {_REMEDY}"
    ) from error
_check(_cpu)

try:
    _cuda = importlib.import_module("rom._C_cuda")
except ImportError as error:
    CUDA_REASON = f"built without CUDA kernels ({error})"
else:
    _check(_cuda)


def has(kernel: str, device_type: str) -> bool:
    """Whether the native module of a device type ("cpu" or "cuda") offers this kernel."""
    module = _cpu if device_type == "cpu" else _cuda
    return module is not None and kernel in module.kernels


def cpu_isa() -> str:
    """The instruction set the CPU kernels run on: "base", "avx2" or "avx512" (capped by ROM_MAX_CPU_ISA)."""
    return _cpu.cpu_isa()


def empty(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory a kernel is about to write. All outputs come from here, so that the tests can poison them with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def call(kernel: str, device: torch.device, **arguments: Any) -> None:
    """Runs a kernel of `device`'s native module: torch's thread count on the CPU, the current stream on a GPU."""
    if device.type == "cpu":
        getattr(_cpu, kernel)(threads=torch.get_num_threads(), **arguments)
        return
    assert _cuda is not None, "the backend choice offers CUDA kernels only where they exist"
    with torch.cuda.device(device):
        getattr(_cuda, kernel)(stream=torch.cuda.current_stream().cuda_stream, **arguments)


def workspace(kernel: str, device: torch.device, **arguments: Any) -> torch.Tensor:
    """Scratch memory of the size the kernel asks for with these arguments."""
    module = _cpu if device.type == "cpu" else _cuda
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = getattr(module, f"{kernel}_workspace")(threads=threads, **arguments)
    return empty((size,), torch.uint8, device)
