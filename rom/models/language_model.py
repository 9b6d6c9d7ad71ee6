"""The Routing Mamba language model: embedding, Routing Mamba blocks on a residual stream, output layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from rom import ops
from rom.files import replacing
from rom.models import checkpoint_layouts, generation
from rom.models.cache import RoutingMambaCache
from rom.models.config import RoutingMambaConfig
from rom.nn import mamba_weights, routing_losses
from rom.nn.block import RoutingMambaBlock
from rom.nn.norm import AddRMSNorm
from rom.nn.routed_linear import RoutedLinear

IGNORED_LABEL = -100


@dataclass
class RoutingMambaOutput:
    """What `RoutingMambaLM.forward` returns.

    Attributes:
        logits: `[batch, length, vocab_size]`, the scores of each next token.
        loss: mean cross-entropy in nats, plus the auxiliary losses with their coefficients; None without labels.
        cache: the cache that was passed in, now after these tokens.
        aux: with labels, the terms of the loss before their coefficients: `cross_entropy`, and where their
            coefficients are not 0 `load_balance` and `z_loss`, averaged over the layers.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    cache: RoutingMambaCache | None = None
    aux: dict[str, torch.Tensor] = field(default_factory=dict)


class _Layer(nn.Module):
    """Norm and block. The names norm and mixer, and those of the backbone, are mamba_ssm's."""

    def __init__(self, config: RoutingMambaConfig, layer_idx: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config.d_model, config.norm_epsilon, config.residual_in_fp32, **factory)
        self.mixer = RoutingMambaBlock(**config.block_arguments(), layer_idx=layer_idx, **factory)


class _Backbone(nn.Module):
    def __init__(self, config: RoutingMambaConfig, factory: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(_Layer(config, i, factory) for i in range(config.n_layer))
        self.norm_f = AddRMSNorm(config.d_model, config.norm_epsilon, config.residual_in_fp32, **factory)


class RoutingMambaLM(nn.Module):
    """A causal language model of `rom.RoutingMambaBlock`s; with `num_experts=1` it is Mamba.

    Its state dict has mamba_ssm's key names, without `lm_head.weight` where the embedding is tied.

    Args:
        config: sizes, routing, auxiliary losses.
        device, dtype: of the parameters (see `rom.RoutingMambaBlock` for those that stay float32).

    >>> model = rom.models.RoutingMambaLM(rom.models.RoutingMambaConfig.preset("tiny", vocab_size=256))
    >>> tokens = torch.randint(256, (2, 16))
    >>> out = model(tokens, labels=tokens)
    >>> out.logits.shape, out.loss.shape
    (torch.Size([2, 16, 256]), torch.Size([]))
    >>> model.generate(tokens, max_new_tokens=4).shape
    torch.Size([2, 20])
    """

    def __init__(
        self,
        config: RoutingMambaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.backbone = _Backbone(config, factory)
        self.lm_head: nn.Linear | None = None  # tied: the embedding's weight serves
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **factory)
        self._init_weights()

    def _layers(self) -> Sequence[_Layer]:
        return cast("Sequence[_Layer]", self.backbone.layers)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Mamba's start: small embeddings, zero biases, and output projections scaled down by the depth."""
        nn.init.normal_(self.backbone.embedding.weight, std=self.config.initializer_range)
        for name, parameter in self.named_parameters():
            if name.endswith(("in_proj.bias", "in_proj_x.bias", "in_proj_z.bias", "out_proj.bias")):
                parameter.zero_()
            elif name.endswith("out_proj.weight"):
                parameter.div_(self.config.n_layer**0.5)

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        cache: RoutingMambaCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> RoutingMambaOutput:
        """Scores of every next token.

        Args:
            input_ids: `[batch, length]` integers.
            labels: `[batch, length]`, usually input_ids itself: they are shifted inside, so the logits at position t
                are held against label t + 1. −100 is ignored, and so are pairs across cu_seqlens.
            cache: from `allocate_cache`: the tokens continue what it has seen, and it is updated in place.
            cu_seqlens: `[sequences + 1]` int32, boundaries of sequences packed into a batch of 1.
            logits_to_keep: only the last so many positions' logits; 0 keeps all.

        Raises:
            ValueError: input_ids is not two-dimensional, labels have another shape or come with logits_to_keep, or the
            cache holds another batch. TypeError: input_ids are not integers.
        """
        self._check_inputs(input_ids, labels, cache, cu_seqlens, logits_to_keep)
        aux: dict[str, list[torch.Tensor]] = {}
        hidden, residual = self.backbone.embedding(input_ids), None
        for i, layer in enumerate(self._layers()):
            normed, residual = layer.norm(hidden, residual)
            routing = self._routing_with_losses(layer.mixer, normed, aux) if labels is not None else None
            hidden = layer.mixer(normed, None if cache is None else cache[i], cu_seqlens, routing)
        normed, _ = self.backbone.norm_f(hidden, residual)
        logits = self._logits(normed[:, -logits_to_keep:])  # -0 keeps all
        if labels is None:
            return RoutingMambaOutput(logits, cache=cache)
        terms = {"cross_entropy": _cross_entropy(logits, labels, cu_seqlens)}
        terms |= {name: torch.stack(values).mean() for name, values in aux.items()}
        loss = terms["cross_entropy"]
        for name in aux:
            loss = loss + getattr(self.config, f"{name}_coefficient") * terms[name]
        return RoutingMambaOutput(logits, loss, cache, terms)

    def _routing_with_losses(
        self, mixer: RoutingMambaBlock, normed: torch.Tensor, aux: dict[str, list[torch.Tensor]]
    ) -> ops.Routing | None:
        """The block's routing, computed here where an auxiliary loss needs its logits; else None."""
        config = self.config
        if mixer.router is None or not (config.load_balance_coefficient or config.z_loss_coefficient):
            return None
        logits = mixer.router_logits(normed)
        routing = ops.route(logits, mixer.top_k, mixer.normalize, mixer.routed_scale)
        if config.load_balance_coefficient:
            aux.setdefault("load_balance", []).append(routing_losses.load_balance_loss(routing))
        if config.z_loss_coefficient:
            aux.setdefault("z_loss", []).append(routing_losses.router_z_loss(logits))
        return routing

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        weight = self.backbone.embedding.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(normed, weight)
        padded = self.config.padded_vocab_size > self.config.vocab_size
        return logits[..., : self.config.vocab_size] if padded else logits

    def _check_inputs(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        cache: RoutingMambaCache | None,
        cu_seqlens: torch.Tensor | None,
        logits_to_keep: int,
    ) -> None:
        if input_ids.dim() != 2:
            raise ValueError(
                f"RoutingMambaLM: expected input_ids of shape (batch, length), got {tuple(input_ids.shape)}."
            )
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"RoutingMambaLM: expected input_ids of integers, got {input_ids.dtype}.")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"RoutingMambaLM: expected labels of input_ids' shape {tuple(input_ids.shape)}, got "
                f"{tuple(labels.shape)}. They are shifted inside."
            )
        if logits_to_keep < 0 or (logits_to_keep and labels is not None):
            raise ValueError(f"RoutingMambaLM: expected logits_to_keep >= 0, and 0 with labels, got {logits_to_keep}.")
        sequences = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cache is not None and (len(cache), cache.batch) != (self.config.n_layer, sequences):
            raise ValueError(
                f"RoutingMambaLM: expected a cache of {self.config.n_layer} layers and {sequences} sequences, got one "
                f"of {len(cache)} and {cache.batch}. Use allocate_cache({sequences})."
            )

    # ------------------------------------------------------------------------------------------------------- decoding
    def allocate_cache(self, batch: int, dtype: torch.dtype | None = None) -> RoutingMambaCache:
        """An empty cache for `batch` sequences; dtype is that of the convolution states, default the model's."""
        states = [layer.mixer.allocate_inference_cache(batch, dtype=dtype) for layer in self._layers()]
        return RoutingMambaCache(torch.stack([conv for conv, _ in states]), torch.stack([ssm for _, ssm in states]))

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, cache: RoutingMambaCache) -> torch.Tensor:
        """Logits `[batch, vocab_size]` after one more token per sequence, `[batch]`; the cache is updated in place."""
        if token_ids.dim() != 1:
            raise ValueError(
                f"RoutingMambaLM.step: expected token_ids of shape (batch,), got {tuple(token_ids.shape)}."
            )
        self._check_inputs(token_ids[:, None], None, cache, None, 0)
        hidden, residual = self.backbone.embedding(token_ids[:, None]), None
        for i, layer in enumerate(self._layers()):
            normed, residual = layer.norm(hidden, residual)
            hidden, _, _ = layer.mixer.step(normed, *cache[i])
        normed, _ = self.backbone.norm_f(hidden, residual)
        return self._logits(normed[:, 0])

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: int | Iterable[int] | None = None,
        streamer: generation.Streamer | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Prompt and continuation, `[batch, length + at most max_new_tokens]`.

        Args:
            input_ids: `[batch, length]`, prompts of one length; length >= 1.
            max_new_tokens: how many tokens to add at most.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `rom.models.generation.Sampling`.
            stop: token ids that end a sequence. It repeats its stop token until all have ended.
            streamer: gets the prompt, then each token (`put`), then `end`.
            generator: the source of randomness; with the same seed the same text.

        Raises:
            ValueError: an empty prompt, or an argument out of range.
        """
        sampling = generation.Sampling(do_sample, repetition_penalty, temperature, top_k, top_p, min_p)
        return generation.generate(self, input_ids, max_new_tokens, sampling, stop, streamer, generator)

    # ------------------------------------------------------------------------------------------------------ statistics
    def num_parameters(self, active: bool = False) -> int:
        """Parameters, all of them, or those one token meets: top_k of num_experts in every routed projection."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if not active:
            return total
        routed = sum(p.numel() for m in self.modules() if isinstance(m, RoutedLinear) for p in m.parameters())
        return total - routed + routed * self.config.top_k // self.config.num_experts

    def load_statistics(self) -> routing_losses.RoutingStatistics | None:
        """How the last forward or step spread its tokens over the experts, fields with a leading layer axis.

        None before it and for a model without experts.
        """
        layers = [layer.mixer.load_statistics() for layer in self._layers()]
        known = [statistics for statistics in layers if statistics is not None]
        if not known:
            return None
        return routing_losses.RoutingStatistics(
            fraction=torch.stack([layer.fraction for layer in known]),
            probability=torch.stack([layer.probability for layer in known]),
            entropy=torch.stack([layer.entropy for layer in known]),
            dropped=sum(layer.dropped for layer in known),
        )

    # --------------------------------------------------------------------------------------------------------- storage
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into `folder`; each appears complete or not at all.

        ImportError if safetensors is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors = checkpoint_layouts.safetensors_torch()
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with replacing(folder / "model.safetensors") as file:
            safetensors.save_file(tensors, file, metadata={"format": "pt"})
        with replacing(folder / "config.json") as file:
            file.write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> RoutingMambaLM:
        """The model that `save_pretrained` wrote, in the dtype it had or in `dtype`.

        Raises:
            FileNotFoundError: no such files. ValueError: they are truncated or do not fit together.
        """
        folder = Path(folder)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{config_file} does not exist: {folder} holds no saved RoutingMambaLM.")
        config = RoutingMambaConfig.from_json(config_file.read_text(encoding="utf-8"))
        state = checkpoint_layouts.load_tensors(folder / "model.safetensors")
        stored = state["backbone.embedding.weight"].dtype if "backbone.embedding.weight" in state else None
        model = cls(config, device="meta", dtype=dtype or stored)
        _check_state(model, state, folder)
        model.to_empty(device=device)
        model.load_state_dict(state)
        return model

    @classmethod
    def from_mamba(
        cls,
        source: checkpoint_layouts.Source,
        num_experts: int = 1,
        noise: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> RoutingMambaLM:
        """A model from a dense Mamba language model; with experts, each starts as a copy ("upcycling").

        Args:
            source: Hugging Face's `MambaForCausalLM` or mamba_ssm's `MambaLMHeadModel`, as a module, a state dict, a
                checkpoint file, or a folder of one.
            num_experts, noise: see `rom.RoutingMambaBlock.from_mamba`.
            device, dtype: of the model, by default the source's.
            fields: further fields of `RoutingMambaConfig` (top_k, experts_on, norm_epsilon, …). vocab_size may be
                smaller than the embedding: its last rows are then padding.

        The configuration follows from the shapes. ValueError: keys or shapes of another architecture.
        """
        state, sizes = checkpoint_layouts.read_dense(source)
        fields = {**sizes, **mamba_weights.upcycled_scale(num_experts, fields), **fields}
        rows = sizes["vocab_size"]
        if fields["vocab_size"] != rows:
            if fields["vocab_size"] > rows:
                raise ValueError(f"from_mamba: expected vocab_size <= {rows}, got {fields['vocab_size']}.")
            fields["pad_vocab_size_multiple"] = rows
        embedding = state["backbone.embedding.weight"]
        model = cls(
            RoutingMambaConfig(**fields, num_experts=num_experts), device or embedding.device, dtype or embedding.dtype
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mixer." not in name:
                    parameter.copy_(state[name])
        for i, layer in enumerate(model._layers()):
            mamba_weights.load_dense(layer.mixer, checkpoint_layouts.layer_state(state, i), noise)
        return model


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Mean over the positions that have a next token; the labels move, not the logits: no copy of them."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if cu_seqlens is not None:
        targets[:, (cu_seqlens[1:] - 1).clamp_min(0).long()] = IGNORED_LABEL
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=IGNORED_LABEL)


def _check_state(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    expected = model.state_dict()
    problems = mamba_weights.key_differences(state, set(expected), set())
    wrong = [
        f"{name} of shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems or wrong:
        what = "; ".join([*([problems] if problems else []), *wrong])
        raise ValueError(f"{folder}: model.safetensors does not fit config.json: {what}.")
