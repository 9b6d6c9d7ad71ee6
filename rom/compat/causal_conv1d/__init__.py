"""The package `causal_conv1d` on our operators: `causal_conv1d_fn` and `causal_conv1d_update`."""

from rom.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
