"""The operators: thin, checked, differentiable functions over the kernels."""

from rom.ops.conv import causal_conv1d
from rom.ops.conv_update import causal_conv1d_update
from rom.ops.faults import faulty_matmul, faulty_values
from rom.ops.last_layer import logit_flips, weight_flips
from rom.ops.norm import add_rms_norm
from rom.ops.orthogonal import cayley, householder, orthogonality_error
from rom.ops.orthogonal_inverse import cayley_inverse, householder_inverse
from rom.ops.orthogonal_products import orthogonal_apply
from rom.ops.routed_linear import routed_linear
from rom.ops.routing import Routing, route
from rom.ops.scan import selective_scan
from rom.ops.state_update import selective_state_update

__all__ = [
    "Routing",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "cayley",
    "cayley_inverse",
    "faulty_matmul",
    "faulty_values",
    "householder",
    "householder_inverse",
    "logit_flips",
    "orthogonal_apply",
    "orthogonality_error",
    "route",
    "routed_linear",
    "selective_scan",
    "selective_state_update",
    "weight_flips",
]
