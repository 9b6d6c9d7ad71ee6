"""The operators: thin, checked, differentiable functions over the kernels."""

from rom.ops.norm import add_rms_norm
from rom.ops.routed_linear import routed_linear
from rom.ops.routing import Routing, route
from rom.ops.scan import selective_scan

__all__ = ["Routing", "add_rms_norm", "route", "routed_linear", "selective_scan"]
