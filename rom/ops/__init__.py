"""The operators: thin, checked, differentiable functions over the kernels."""

from rom.ops.norm import add_rms_norm
from rom.ops.scan import selective_scan

__all__ = ["add_rms_norm", "selective_scan"]
