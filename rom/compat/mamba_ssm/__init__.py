"""The package `mamba_ssm` (its first generation, Mamba-1) on our operators, under its own names.

What is not here raises an ImportError that says so: Mamba-2 and what belongs to it.
"""

from typing import NoReturn

from rom.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from rom.compat.mamba_ssm.modules.mamba_simple import Mamba
from rom.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "2.2.6"  # the interface that is followed
__all__ = ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]


def __getattr__(name: str) -> NoReturn:
    if name.startswith("Mamba"):
        raise ImportError(f"rom.compat.mamba_ssm has Mamba and MambaLMHeadModel, no {name}: install mamba_ssm for it.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
