"""How evenly a router loads its experts, and the losses that push it to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rom.ops.routing import Routing


class RoutingStatistics(NamedTuple):
    """What the router did with a batch; all detached, float32 (float64 for a float64 routing).

    Fields:
        fraction: `[E]`, share of the slots each expert got; sums to 1. Even load is 1/E.
        probability: `[E]`, mean of the router's probabilities.
        entropy: mean entropy of a token's probabilities, in nats: 0 (certain) … log E (undecided).
        dropped: slots without an expert: always 0, for there is no capacity limit.
    """

    fraction: torch.Tensor
    probability: torch.Tensor
    entropy: torch.Tensor
    dropped: int


def _shares(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Fraction of the slots and mean probability, per expert; zeros for an empty batch."""
    tokens = max(routing.num_tokens, 1)
    return routing.counts.to(routing.probs.dtype) / (tokens * routing.top_k), routing.probs.sum(0) / tokens


def routing_statistics(routing: Routing) -> RoutingStatistics:
    """The load of each expert; costs a few operations on `[T, E]` and no synchronisation.

    >>> rom.nn.routing_statistics(rom.ops.route(torch.tensor([[5.0, 0.0], [4.0, 0.0]]), top_k=1)).fraction
    tensor([1., 0.])
    """
    fraction, probability = _shares(routing)
    entropy = torch.special.entr(routing.probs).sum() / max(routing.num_tokens, 1)
    return RoutingStatistics(fraction, probability.detach(), entropy.detach(), dropped=0)


def load_balance_loss(routing: Routing) -> torch.Tensor:
    """E · Σ_e fraction_e · probability_e: 1 at even load, E when everything goes to one expert.

    Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), eq. 4–6; for top_k > 1 the fraction counts slots.
    The gradient flows through the probabilities. Routing Mamba needs none of this by default.

    >>> rom.nn.load_balance_loss(rom.ops.route(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), top_k=2))
    tensor(1.)
    """
    fraction, probability = _shares(routing)
    return routing.num_experts * (fraction * probability).sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of (log Σ_e exp logit_e)², which keeps the logits `[T, E]` small; float32 or wider.

    Source: Zoph et al., "ST-MoE" (arXiv 2202.08906), eq. 5.

    >>> router_z = rom.nn.router_z_loss(torch.zeros(3, 4))  # log(4)²
    >>> round(router_z.item(), 4)
    1.9218
    """
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(compute).logsumexp(-1).square().sum() / max(logits.shape[0], 1)
