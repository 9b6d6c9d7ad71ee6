"""nn.Modules over the operators."""

from rom.nn.routed_linear import RoutedLinear
from rom.nn.routing_losses import RoutingStatistics, load_balance_loss, router_z_loss, routing_statistics

__all__ = ["RoutedLinear", "RoutingStatistics", "load_balance_loss", "router_z_loss", "routing_statistics"]
