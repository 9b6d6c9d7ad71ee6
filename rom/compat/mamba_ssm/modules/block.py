"""`Block`, where later versions of the original keep it."""

from rom.compat.mamba_ssm.modules.mamba_simple import Block

__all__ = ["Block"]
