"""Mamba, FalconMamba, Jamba and Zamba of Hugging Face transformers on our operators, on CPUs and GPUs.

    import rom.compat.transformers
    rom.compat.transformers.enable()              # from here on
    with rom.compat.transformers.enable():        # or for a while

The models' files define the scan, the convolution and their one-token forms as functions of the module, which it looks
up at every call; `enable` puts ours in their place. Models that exist already are served, too.
"""

from __future__ import annotations

import importlib
from types import ModuleType, TracebackType
from typing import Any

import torch

from rom.compat.causal_conv1d import causal_conv1d_interface
from rom.compat.mamba_ssm.ops import selective_scan_interface
from rom.compat.mamba_ssm.ops.triton import selective_state_update as state_update_interface

MODELS = ("mamba", "falcon_mamba", "jamba", "zamba")
SUPPORTED = "5.23"  # tested with; the functions by name are what counts


class UnsupportedTransformers(ImportError):
    """This version of transformers has no functions that could be replaced."""


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    """(batch, dim, length); further options are of the model, not of the convolution."""
    return causal_conv1d_interface.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation)


def causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """(batch, dim, steps)."""
    with torch.no_grad():
        return causal_conv1d_interface.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    *rest: Any,
    dt_rms_weight: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """A whole block, for training. FalconMamba's norm of dt comes with as many ones as there are channels."""
    if dt_rms_weight is not None:
        dt_rms_weight = dt_rms_weight[: delta_proj_weight.shape[1]]
    options["dt_rms_weight"] = dt_rms_weight
    return selective_scan_interface.mamba_inner_fn(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, *rest, **options
    )


def mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """(batch, dim, length); which slow path the configuration asks for does not matter."""
    return selective_scan_interface.selective_scan_fn(
        hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


def mamba_selective_state_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """(batch, dim); the order of the arguments is that of transformers."""
    return state_update_interface.selective_state_update(
        state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus
    )  # fmt: skip


FUNCTIONS = (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    mamba_selective_scan,
    mamba_selective_state_update,
)
_REQUIRED = {"causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update"}
_originals: dict[str, dict[str, Any]] = {}  # by model: what stood there before `enable`


class Enabled:
    """What `enable` returns. `disable` puts the old functions back; as a context manager it does so at the end."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self.models = models

    def disable(self) -> None:
        """Undoes the `enable` that returned this; a second time nothing happens."""
        for model in self.models:
            for name, function in _originals.pop(model).items():
                setattr(_modeling(model), name, function)
        self.models = ()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable(*models: str) -> Enabled:
    """Puts our operators into transformers' models.

    Args:
        models: of "mamba", "falcon_mamba", "jamba" and "zamba"; none: all of them.

    Returns:
        `Enabled`, to undo it. Models that are enabled already stay with the call that enabled them.

    Raises:
        UnsupportedTransformers: transformers is not installed, or its version keeps these functions elsewhere.
        ValueError: an unknown model.

    Shapes, dtypes and caches are transformers' own, results those of its slow path to rounding (states are computed in
    float32). Second derivatives need `rom.backend("reference")`.

    >>> import rom.compat.transformers
    >>> with rom.compat.transformers.enable("mamba") as enabled:
    ...     print(enabled.models)
    ('mamba',)
    """
    if unknown := sorted(set(models) - set(MODELS)):
        raise ValueError(f"rom.compat.transformers: expected models of {', '.join(MODELS)}, got {', '.join(unknown)}.")
    wanted = tuple(model for model in models or MODELS if model not in _originals)
    modules = {model: _modeling(model) for model in wanted}
    for model, module in modules.items():
        if missing := sorted(_REQUIRED - set(vars(module))):
            raise UnsupportedTransformers(
                f"rom.compat.transformers: transformers {importlib.import_module('transformers').__version__} has no "
                f"{', '.join(missing)} in its {model} model. It is known to work with {SUPPORTED}."
            )
    for model, module in modules.items():
        replaced = [function for function in FUNCTIONS if hasattr(module, function.__name__)]
        _originals[model] = {function.__name__: getattr(module, function.__name__) for function in replaced}
        for function in replaced:
            setattr(module, function.__name__, function)
    return Enabled(wanted)


def _modeling(model: str) -> ModuleType:
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError as error:
        raise UnsupportedTransformers(
            f"rom.compat.transformers: the {model} model cannot be imported ({error}). Install transformers, "
            f"known to work with {SUPPORTED}."
        ) from error
