"""The operators: thin, checked, differentiable functions over the kernels."""

from rom.ops.conv import causal_conv1d
from rom.ops.conv_update import causal_conv1d_update
from rom.ops.norm import add_rms_norm
from rom.ops.routed_linear import routed_linear
from rom.ops.routing import Routing, route
from rom.ops.scan import selective_scan
from rom.ops.state_update import selective_state_update

__all__ = [
    "Routing",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "route",
    "routed_linear",
    "selective_scan",
    "selective_state_update",
]
