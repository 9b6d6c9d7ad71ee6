"""Weights of dense Mamba blocks: reading their sizes, and copying them into a block of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from rom.nn.block import RoutingMambaBlock

REQUIRED = (
    "in_proj.weight",
    "conv1d.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
)
OPTIONAL = ("conv1d.bias", "in_proj.bias", "out_proj.bias")
# A router that starts at 1 % of its usual size leaves P ≈ 1/E, yet breaks the tie between equal experts at random.
UPCYCLED_ROUTER_SCALE = 0.01


def state_of(source: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a module, or a copy of the given one."""
    return dict(source.state_dict() if isinstance(source, nn.Module) else source)


def key_differences(found: Mapping[str, Any], required: set[str], optional: set[str]) -> str:
    """What is missing and what is too much, for an error message; empty if nothing is."""
    missing, unexpected = sorted(required - set(found)), sorted(set(found) - required - optional)
    parts = [f"missing {', '.join(missing)}"] if missing else []
    return "; ".join(parts + ([f"unexpected {', '.join(unexpected)}"] if unexpected else []))


def block_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The constructor's arguments that a dense block's weights imply."""
    if differences := key_differences(state, set(REQUIRED), set(OPTIONAL)):
        raise ValueError(f"from_mamba: expected the keys of a dense Mamba block; {differences}.")
    d_model, d_inner = state["in_proj.weight"].shape[-1], state["A_log"].shape[0]
    sizes = {
        "d_model": d_model,
        "d_state": state["A_log"].shape[-1],
        "d_conv": state["conv1d.weight"].shape[-1],
        "dt_rank": state["dt_proj.weight"].shape[-1],
    }
    expected = {
        "in_proj.weight": (2 * d_inner, d_model),
        "in_proj.bias": (2 * d_inner,),
        "conv1d.weight": (d_inner, 1, sizes["d_conv"]),
        "conv1d.bias": (d_inner,),
        "x_proj.weight": (sizes["dt_rank"] + 2 * sizes["d_state"], d_inner),
        "dt_proj.weight": (d_inner, sizes["dt_rank"]),
        "dt_proj.bias": (d_inner,),
        "A_log": (d_inner, sizes["d_state"]),
        "D": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
        "out_proj.bias": (d_model,),
    }
    for key, tensor in state.items():
        if tuple(tensor.shape) != expected[key]:
            raise ValueError(f"from_mamba: expected {key} of shape {expected[key]}, got {tuple(tensor.shape)}.")
    expand = d_inner // d_model if d_inner % d_model == 0 else d_inner / d_model
    return {**sizes, "expand": expand, "conv_bias": "conv1d.bias" in state, "bias": "in_proj.bias" in state}


def upcycled_scale(num_experts: int, options: Mapping[str, Any]) -> dict[str, float]:
    """The routed_scale at which equal weights 1/E on K copies add up to the dense block, unless the options set one."""
    if num_experts == 1 or "routed_scale" in options or options.get("normalize", False):
        return {}
    return {"routed_scale": num_experts / options.get("top_k", 1)}


@torch.no_grad()
def load_dense(block: RoutingMambaBlock, state: Mapping[str, torch.Tensor], noise: float) -> None:
    """Copies a dense block's weights; a parameter with an expert axis gets one copy per expert.

    Summed over K experts without a weight, K equal copies would come out K times too large: they are divided by K.
    """
    if block.router is not None:
        block.router.weight.mul_(UPCYCLED_ROUTER_SCALE)
    unweighted_sum = block.top_k if "out" in block.experts_on else 1
    for name, parameter in block.named_parameters():
        if name == "router.weight":
            continue
        source = _source(name, state, block.d_inner).to(parameter)
        if parameter.dim() == source.dim():
            parameter.copy_(source)
            continue
        if not name.startswith("out_proj"):
            source = source / unweighted_sum
        parameter.copy_(source)  # the same for every expert
        if noise > 0:
            parameter.add_(torch.randn_like(parameter) * (noise * source.std()))


def _source(name: str, state: Mapping[str, torch.Tensor], d_inner: int) -> torch.Tensor:
    """The dense tensor that the parameter `name` comes from."""
    for half, rows in (("in_proj_x.", slice(0, d_inner)), ("in_proj_z.", slice(d_inner, None))):
        if name.startswith(half):
            return state["in_proj." + name.removeprefix(half)][rows]
    return state[name]
