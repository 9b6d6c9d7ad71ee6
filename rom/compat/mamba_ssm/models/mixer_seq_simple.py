"""`MambaLMHeadModel`, `MixerModel` and `create_block` with the original's arguments and parameter names."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rom.compat.mamba_ssm.models.config_mamba import MambaConfig
from rom.compat.mamba_ssm.modules.mamba_simple import Block, Mamba
from rom.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, apply_norm
from rom.compat.mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from rom.compat.mamba_ssm.utils.hf import CONFIG_NAME, WEIGHTS_NAME, load_config_hf, load_state_dict_hf
from rom.files import replacing


class CausalLMOutput(NamedTuple):
    """logits `[batch, length, vocab_size]`."""

    logits: torch.Tensor


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Norm and `Mamba` of one layer. ValueError: Mamba-2, attention or MLP layers, which rom.compat does not have."""
    options = dict(ssm_cfg or {})
    if (layer := options.pop("layer", "Mamba1")) != "Mamba1":
        raise ValueError(f"rom.compat.mamba_ssm: expected ssm_cfg with layer Mamba1, got {layer}. Install mamba_ssm.")
    if d_intermediate or attn_layer_idx or attn_cfg:
        raise ValueError("rom.compat.mamba_ssm: expected a model of Mamba layers only, got MLP or attention layers.")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer = partial(Mamba, layer_idx=layer_idx, **options, **factory)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    block = Block(d_model, mixer, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


class MixerModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norms: dict[str, Any] = {
            "norm_epsilon": norm_epsilon,
            "rms_norm": rms_norm,
        }
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, fused_add_norm=fused_add_norm,
                residual_in_fp32=residual_in_fp32, layer_idx=i, **norms, **factory,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        _initialise(self, n_layer, **(initializer_cfg or {}))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> dict[int, Any]:
        """The states of all layers, as `InferenceParams.key_value_memory_dict` holds them."""
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype) for i, layer in enumerate(self.layers)}  # type: ignore[operator]

    def forward(
        self, input_ids: torch.Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> torch.Tensor:
        """Hidden states `[batch, length, d_model]`."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return apply_norm(self.norm_f, hidden, residual, False, self.residual_in_fp32)


@torch.no_grad()
def _initialise(
    model: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Mamba's start: small embeddings, zero biases, output projections scaled down by the depth."""
    for name, parameter in model.named_parameters():
        if name.endswith("embedding.weight"):
            nn.init.normal_(parameter, std=initializer_range)
        elif name.endswith(("in_proj.bias", "out_proj.bias")):
            parameter.zero_()
        elif name.endswith("out_proj.weight") and rescale_prenorm_residual:
            parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A Mamba language model; `state_dict` has the original's keys, `lm_head.weight` among them."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = math.ceil(config.vocab_size / multiple) * multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab_size,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """The output layer uses the embedding's weight, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """See `MixerModel`."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of every position, or of the last num_last_tokens; position_ids are not used."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:]))  # -0 keeps all

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """A model from a folder that `save_pretrained` wrote, or from a repository (needs huggingface_hub)."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device, dtype))
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json and pytorch_model.bin; each appears complete or not at all."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS_NAME) as file:
            torch.save(self.state_dict(), file)
        with replacing(folder / CONFIG_NAME) as file:
            file.write_text(json.dumps(vars(self.config), indent=4), encoding="utf-8")
