"""Continuing prompts: greedy and sampled decoding, one `step` per token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from rom.models.language_model import RoutingMambaLM


class Streamer(Protocol):
    """Receives tokens as they come; Hugging Face's `TextStreamer` is one."""

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt `[batch, length]` first, then each new token `[batch]`, on the CPU."""

    def end(self) -> None:
        """Nothing more comes."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits; the filters apply in the order of the fields.

    Attributes:
        do_sample: draw at random; False takes the most likely token, and the fields after the penalty do not matter.
        repetition_penalty: > 1 makes tokens already in the sequence less likely (Keskar et al., "CTRL", 2019, §4.1).
        temperature: divides the logits; > 0.
        top_k: only the k most likely tokens; 0 keeps all.
        top_p: only the most likely tokens that together reach this probability (Holtzman et al., 2019); 1 keeps all.
        min_p: only tokens at least this fraction as likely as the most likely one (Nguyen et al., 2024); 0 keeps all.
    """

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty > 0": self.repetition_penalty > 0,
            "temperature > 0 (do_sample=False is greedy)": self.temperature > 0,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "0 <= min_p <= 1": 0 <= self.min_p <= 1,
        }
        for expected, holds in checks.items():
            if not holds:
                raise ValueError(f"generate: expected {expected}, got {getattr(self, _field_of(expected))!r}.")

    def __call__(
        self, logits: torch.Tensor, seen: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Next tokens `[batch]` from logits `[batch, vocab]`; `seen` `[batch, vocab]` marks tokens already used."""
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if not self.do_sample:
            return logits.argmax(-1)
        probs = torch.softmax(self.filter(logits / self.temperature), dim=-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def filter(self, logits: torch.Tensor) -> torch.Tensor:
        """−∞ where top_k, top_p or min_p exclude a token; the most likely one always stays."""
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probs = torch.softmax(ordered, dim=-1)
            excluded = probs.cumsum(-1) - probs >= self.top_p  # what stands before a token already suffices
            logits = logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), float("-inf"))
        if self.min_p > 0:
            probs = torch.softmax(logits, dim=-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), float("-inf"))
        return logits


def _field_of(expected: str) -> str:
    return next(name for name in expected.split() if name.isidentifier())


@torch.inference_mode()
def generate(
    model: RoutingMambaLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop: int | Iterable[int] | None = None,
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """See `RoutingMambaLM.generate`."""
    if max_new_tokens < 0:
        raise ValueError(f"generate: expected max_new_tokens >= 0, got {max_new_tokens}.")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: expected input_ids of shape (batch, length) with length >= 1, got {tuple(input_ids.shape)}."
        )
    stops = [stop] if isinstance(stop, int) else list(stop or ())
    stop_ids = torch.tensor(stops, device=input_ids.device, dtype=input_ids.dtype)
    batch, prompt = input_ids.shape
    tokens = input_ids.new_empty(batch, prompt + max_new_tokens)
    tokens[:, :prompt] = input_ids
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(batch, model.config.vocab_size, dtype=torch.bool, device=input_ids.device)
        seen.scatter_(1, input_ids.long(), True)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    cache = model.allocate_cache(batch)
    for length in range(prompt, prompt + max_new_tokens):
        if length == prompt:
            logits = model(input_ids, cache=cache, logits_to_keep=1).logits[:, -1]
        else:
            logits = model.step(tokens[:, length - 1], cache)
        chosen = sampling(logits, seen, generator).to(tokens.dtype)
        # a sequence that has stopped repeats its stop token while the others go on
        tokens[:, length] = torch.where(finished, tokens[:, length - 1], chosen)
        if seen is not None:
            seen.scatter_(1, tokens[:, length : length + 1].long(), True)
        if streamer is not None:
            streamer.put(tokens[:, length].cpu())
        if stops:
            finished |= torch.isin(tokens[:, length], stop_ids)
            if finished.all():
                tokens = tokens[:, : length + 1]
                break
    if streamer is not None:
        streamer.end()
    return tokens
