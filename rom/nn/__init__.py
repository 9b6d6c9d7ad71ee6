"""nn.Modules over the operators."""

from rom.nn.block import RoutingMambaBlock
from rom.nn.faulty_linear import FaultyLinear
from rom.nn.norm import AddRMSNorm
from rom.nn.orthogonal import OrthogonalLinear, orthogonal, rebase
from rom.nn.routed_linear import RoutedLinear
from rom.nn.routing_losses import RoutingStatistics, load_balance_loss, router_z_loss, routing_statistics

__all__ = [
    "AddRMSNorm",
    "FaultyLinear",
    "OrthogonalLinear",
    "RoutedLinear",
    "RoutingMambaBlock",
    "RoutingStatistics",
    "load_balance_loss",
    "orthogonal",
    "rebase",
    "router_z_loss",
    "routing_statistics",
]
