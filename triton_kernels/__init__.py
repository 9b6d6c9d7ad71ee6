"""Triton kernels, one file per family; installed as rom.triton_kernels."""
