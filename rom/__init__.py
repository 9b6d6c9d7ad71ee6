"""rom: fast kernels for projection layers and what flows through them, and models built on them."""

from rom import native as native  # first: it explains a missing or stale build

# isort: split
from rom import faults, memory, models, nn, ops
from rom.dispatch import BackendError, BackendStatus, FallbackWarning, backend, backends
from rom.faults.inject import inject
from rom.nn import RoutingMambaBlock
from rom.ops import Routing

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BackendStatus",
    "FallbackWarning",
    "Routing",
    "RoutingMambaBlock",
    "backend",
    "backends",
    "faults",
    "inject",
    "memory",
    "models",
    "nn",
    "ops",
]
