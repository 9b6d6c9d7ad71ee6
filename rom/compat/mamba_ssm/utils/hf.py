"""`load_config_hf` and `load_state_dict_hf`: a folder, or a repository through huggingface_hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rom.models.checkpoint_layouts import load_tensors

CONFIG_NAME, WEIGHTS_NAME = "config.json", "pytorch_model.bin"


def _file(model_name: str, name: str) -> Path:
    """Where a file of a model lies; FileNotFoundError, ImportError: it is not there and cannot be fetched."""
    folder = Path(model_name)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}.")
        return folder / name
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"{model_name} is no folder; to download it install huggingface_hub.") from error
    return Path(hf_hub_download(model_name, name))


def load_config_hf(model_name: str) -> dict[str, Any]:
    """config.json of a model."""
    return json.loads(_file(model_name, CONFIG_NAME).read_text(encoding="utf-8"))


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a model, on a device and in a dtype if given."""
    state = load_tensors(_file(model_name, WEIGHTS_NAME))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}
