"""The native CUDA kernels. Every kernel in `kernels` is a function of keyword arguments; see csrc/include/rom."""

from collections.abc import Callable, Mapping
from typing import Any

abi_version: int
kernels: tuple[str, ...]

def set_dtypes(codes: Mapping[Any, int], /) -> None: ...
def __getattr__(name: str) -> Callable[..., Any]: ...
