"""Reading dense Mamba language models of other packages: their key names, and the configuration their shapes imply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rom.nn import mamba_weights

Source = nn.Module | Mapping[str, torch.Tensor] | str | Path

# Hugging Face's MambaForCausalLM calls the embedding `embeddings`; all else is named as in mamba_ssm, and here.
_RENAMED = {"backbone.embeddings.weight": "backbone.embedding.weight"}
_OUTER = {"backbone.embedding.weight", "backbone.norm_f.weight"}
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


def read_dense(source: Source) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state dict under our names, configuration fields) of a dense Mamba language model.

    source: a module, a state dict, a checkpoint file (.safetensors, .bin, .pt), or a folder holding
    model.safetensors or pytorch_model.bin. The fields come from the shapes; norm_epsilon from the source's own
    configuration where it has one, else 1e-5. ValueError: keys or shapes of another architecture.
    """
    state, epsilon = _load(source)
    state = {_RENAMED.get(key, key): tensor for key, tensor in state.items()}
    depth = 1 + max((int(m.group(1)) for m in map(_LAYER.fullmatch, state) if m), default=0)
    layers = [f"backbone.layers.{i}." for i in range(depth)]
    required = _OUTER | {
        p + k for p in layers for k in ("norm.weight", *(f"mixer.{n}" for n in mamba_weights.REQUIRED))
    }
    optional = {"lm_head.weight"} | {f"{p}mixer.{n}" for p in layers for n in mamba_weights.OPTIONAL}
    if differences := mamba_weights.key_differences(state, required, optional):
        raise ValueError(f"from_mamba: expected the keys of a Mamba language model; {differences}.")

    embedding = state["backbone.embedding.weight"]
    if "lm_head.weight" in state and torch.equal(state["lm_head.weight"], embedding):
        del state["lm_head.weight"]
    sizes = [mamba_weights.block_sizes(layer_state(state, i)) for i in range(depth)]
    if any(size != sizes[0] for size in sizes) or sizes[0]["d_model"] != embedding.shape[1]:
        raise ValueError(f"from_mamba: expected layers of equal shapes and width {embedding.shape[1]}, got {sizes}.")
    fields = {
        **sizes[0],
        "vocab_size": embedding.shape[0],
        "n_layer": depth,
        "tie_embeddings": "lm_head.weight" not in state,
        "norm_epsilon": epsilon,
    }
    return state, fields


def layer_state(state: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The part of a state dict that belongs to layer `layer`'s block."""
    prefix = f"backbone.layers.{layer}.mixer."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _load(source: Source) -> tuple[dict[str, torch.Tensor], float]:
    """State dict and norm epsilon."""
    default = 1e-5  # of mamba_ssm and of every published Mamba checkpoint
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        return mamba_weights.state_of(source), getattr(config, "layer_norm_epsilon", default)
    if isinstance(source, Mapping):
        return dict(source), default
    path = Path(source)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"from_mamba: {path} holds neither model.safetensors nor pytorch_model.bin.")
        config_file = path / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        return load_tensors(files[0]), config.get("layer_norm_epsilon", default)
    return load_tensors(path), default


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of a torch file of tensors; ValueError if it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return {name: tensor.clone() for name, tensor in safetensors_torch().load_file(path).items()}
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # every reader has its own errors for truncated and foreign files
        raise ValueError(f"{path} is damaged, truncated or no checkpoint: {error}") from error


def safetensors_torch() -> Any:
    """safetensors.torch, which only saving and loading need."""
    try:
        import safetensors.torch  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("Checkpoints need safetensors: pip install 'rom-kernels[train]'.") from error
    return safetensors.torch
