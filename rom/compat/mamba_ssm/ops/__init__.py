"""See `rom.compat.mamba_ssm`."""
