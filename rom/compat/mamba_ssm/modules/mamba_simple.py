"""`Mamba` and `Block` with the original's arguments, attributes and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from rom.compat.mamba_ssm.ops.triton.layer_norm import apply_norm
from rom.compat.mamba_ssm.utils.generation import InferenceParams
from rom.nn.block import RoutingMambaBlock


class Mamba(RoutingMambaBlock):
    """A Mamba block: `rom.RoutingMambaBlock` without experts, behind the original's signature.

    use_fast_path is taken, without effect: there is one path, and it is the fast one.

    >>> Mamba(d_model=16, d_state=16, d_conv=4, expand=2)(torch.randn(2, 7, 16)).shape
    torch.Size([2, 7, 16])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        state_space = (d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(
            *state_space, conv_bias, bias, num_experts=1, layer_idx=layer_idx, device=device, dtype=dtype
        )  # fmt: skip
        self.use_fast_path = use_fast_path
        self.activation = "silu"
        self.act = nn.SiLU()

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, inference_params: InferenceParams | None = None, **_: Any
    ) -> torch.Tensor:
        """`[batch, length, d_model]`; with inference_params its states are used and updated in place.

        Source: the original continues at `seqlen_offset > 0`, one token at a time; here any number of tokens does.
        """
        if inference_params is None:
            out = super().forward(hidden_states)
        else:
            cache = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset == 0:
                for state in cache:
                    state.zero_()
            one = hidden_states.shape[1] == 1
            out = self.step(hidden_states, *cache)[0] if one else super().forward(hidden_states, cache)
        assert isinstance(out, torch.Tensor)
        return out

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's (conv_state, ssm_state) out of the shared dictionary; new zeros where there are none."""
        if self.layer_idx is None:
            raise ValueError("Mamba: expected a layer_idx, which names its states in inference_params, got None.")
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(batch_size)
        conv_state, ssm_state = states[self.layer_idx]
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state


class Block(nn.Module):
    """Residual add, norm, mixer: `(hidden_states, residual) -> (hidden_states, residual)`."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.mixer, self.norm = mixer_cls(dim), norm_cls(dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixer's output, and the stream it is to be added to."""
        hidden_states, residual = apply_norm(self.norm, hidden_states, residual, True, self.residual_in_fp32)
        return self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs), residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)  # type: ignore[operator]
