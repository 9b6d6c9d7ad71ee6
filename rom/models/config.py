"""The configuration of a Routing Mamba language model, and the sizes of the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rom.nn.block import EXPERT_PROJECTIONS

#: "Routing Mamba", the four sizes whose parameter counts the paper gives (vocabulary 32 000), and one for a laptop.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 160, "n_layer": 4, "num_experts": 4, "top_k": 1},
    "115m": {"d_model": 768, "n_layer": 24, "num_experts": 8, "top_k": 1},
    "353m": {"d_model": 1024, "n_layer": 48, "num_experts": 8, "top_k": 1},
    "765m": {"d_model": 1536, "n_layer": 48, "num_experts": 8, "top_k": 1},
    "1.3b": {"d_model": 2048, "n_layer": 48, "num_experts": 8, "top_k": 1},
}


@dataclass(frozen=True)
class RoutingMambaConfig:
    """What a `RoutingMambaLM` is made of; `num_experts=1` is plain Mamba.

    Args:
        vocab_size: tokens of the tokenizer.
        d_model, n_layer: width and depth.
        d_state, d_conv, expand, dt_rank, conv_bias, bias: of every block, as in `rom.RoutingMambaBlock`.
        num_experts, top_k, experts_on, normalize, routed_scale, router_jitter: the routing, as in
            `rom.RoutingMambaBlock`.
        residual_in_fp32: keep the residual stream in float32 when the blocks run in bfloat16 or float16.
        tie_embeddings: the output layer uses the embedding's weight.
        pad_vocab_size_multiple: the embedding's rows are rounded up to a multiple of this; logits never show them.
        norm_epsilon: of every RMSNorm.
        initializer_range: standard deviation of the embedding at the start.
        load_balance_coefficient: weight of the Switch load-balance loss in `loss`; the paper needs none.
        z_loss_coefficient: weight of the router's z-loss in `loss`.

    Raises:
        ValueError: a value is out of range; the message names the field.

    >>> config = rom.models.RoutingMambaConfig.preset("tiny", vocab_size=256)
    >>> config.d_model, config.n_layer, config.num_experts, config.top_k
    (160, 4, 4, 1)
    >>> rom.models.RoutingMambaConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] = "auto"
    conv_bias: bool = True
    bias: bool = False
    num_experts: int = 8
    top_k: int = 1
    experts_on: tuple[str, ...] = EXPERT_PROJECTIONS
    normalize: bool = False
    routed_scale: float = 1.0
    router_jitter: float = 0.0
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    load_balance_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts_on", tuple(self.experts_on))  # JSON knows lists only
        for name in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"RoutingMambaConfig: expected {name} to be a positive integer, got {value!r}.")
        for name in ("norm_epsilon", "initializer_range", "load_balance_coefficient", "z_loss_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"RoutingMambaConfig: expected {name} >= 0, got {getattr(self, name)!r}.")

    @classmethod
    def preset(cls, name: str, *, vocab_size: int = 32000, **changes: Any) -> RoutingMambaConfig:
        """One of `tiny`, `115m`, `353m`, `765m`, `1.3b` (`PRESETS`), with any field changed.

        The sizes are the paper's active parameters at a vocabulary of 32 000 with tied embeddings.
        """
        if name not in PRESETS:
            raise ValueError(f"RoutingMambaConfig.preset: expected one of {', '.join(PRESETS)}, got {name!r}.")
        return cls(**{"vocab_size": vocab_size, **PRESETS[name], **changes})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def block_arguments(self) -> dict[str, Any]:
        """The keyword arguments of each layer's `rom.RoutingMambaBlock`."""
        names = ("d_model", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias")
        routing = ("num_experts", "top_k", "experts_on", "normalize", "routed_scale", "router_jitter")
        return {name: getattr(self, name) for name in names + routing}

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {**asdict(self), "experts_on": list(self.experts_on)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingMambaConfig:
        """The inverse of `to_dict`; a key that is no field is a ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"RoutingMambaConfig: unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}."
            )
        if "vocab_size" not in values:
            raise ValueError("RoutingMambaConfig: expected the field vocab_size, which has no default.")
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RoutingMambaConfig:
        """The inverse of `to_json`; text that is not a JSON object is a ValueError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"RoutingMambaConfig: expected JSON, got text that is not ({error}).") from error
        if not isinstance(values, dict):
            raise ValueError(f"RoutingMambaConfig: expected a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)
