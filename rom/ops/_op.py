"""What every operator's file shares: the torch library, argument checks, autocast."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from rom import native

#: Every operator is `torch.ops.rom.<name>`. FRAGMENT, so that a reload does not fail.
LIBRARY = torch.library.Library("rom", "FRAGMENT")
Value = TypeVar("Value")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def define(schema: str) -> None:
    """Adds an operator; `LIBRARY.impl(name, f, "CompositeExplicitAutograd")` gives it a body for every device."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """States, sums and parameters are kept in float32, in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fail(op: str, expected: str, got: str, remedy: str = "") -> NoReturn:
    """Raises the ValueError all operators share: what was expected, what came, what to do."""
    raise ValueError(f"rom.ops.{op}: expected {expected}, got {got}." + (f" {remedy}" if remedy else ""))


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_shape(op: str, name: str, tensor: torch.Tensor | None, *expected: tuple[int, ...]) -> None:
    """`tensor` (if given) must have one of the expected shapes."""
    if tensor is not None and tensor.shape not in expected:
        fail(op, f"{name} of shape {' or '.join(str(e) for e in expected)}", str(shape(tensor)))


def check_tensors(op: str, first: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors must be tensors on one device, the device of `tensors[first]`."""
    lead = tensors[first]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"rom.ops.{op}: expected {name} to be a tensor, got {type(tensor).__name__}.")
        if lead is not None and tensor.device != lead.device:
            fail(
                op,
                f"{name} on {lead.device} like {first}",
                str(tensor.device),
                f"Move it with {name}.to({first}.device).",
            )


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """`tensor` must have one of the dtypes the kernels read."""
    if tensor.dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(
            f"rom.ops.{op}: expected {name} of dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}."
        )


def check_same_dtype(op: str, first: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors must have the dtype of `tensors[first]`."""
    lead = tensors[first]
    assert lead is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != lead.dtype:
            raise TypeError(
                f"rom.ops.{op}: expected {name} of dtype {lead.dtype} like {first}, got {tensor.dtype}. "
                f"Convert it with {name}.to({first}.dtype)."
            )


def autocast(tensor: Value) -> Value:
    """An activation in autocast's dtype, if autocast is on; float64 and complex stay, as under torch's own autocast.

    None, and what is no tensor, passes through for the checks to name.
    """
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    dtype = autocast_dtype(tensor.device.type)
    return tensor if dtype is None else tensor.to(dtype)  # type: ignore[return-value]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device type, or None outside autocast."""
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)  # which knows no meta device
    return torch.get_autocast_dtype(device_type) if enabled else None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keeps torch operations inside in their own precision. Entering torch.autocast costs 10 us: only if it is on."""
    off = autocast_dtype(device_type) is None
    return nullcontext() if off else torch.autocast(device_type, enabled=False)


def unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy. Other strides are free."""
    if tensor is None or tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, if given, in contiguous memory."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


class Kernels(Protocol):
    """Where kernels are: the module `rom.native`, or `Triton`."""

    def call(self, kernel: str, device: torch.device, **arguments: Any) -> None: ...
    def workspace(self, kernel: str, device: torch.device, **arguments: Any) -> torch.Tensor: ...


class Triton:
    """The Triton kernels of a module, whose functions take what the native kernels of the same names take.

    The module is imported at the first call: `import rom` never imports triton.
    """

    def __init__(self, module: str) -> None:
        self.module = module

    def call(self, kernel: str, device: torch.device, **arguments: Any) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            getattr(importlib.import_module(self.module), kernel)(**arguments)

    def workspace(self, kernel: str, device: torch.device, **arguments: Any) -> torch.Tensor:
        size = getattr(importlib.import_module(self.module), f"{kernel}_workspace")(**arguments)
        return native.empty((size,), torch.uint8, device)
