"""The operators: thin, checked, differentiable functions over the kernels."""

from rom.ops.norm import add_rms_norm

__all__ = ["add_rms_norm"]
