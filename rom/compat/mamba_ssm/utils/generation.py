"""`InferenceParams` and `GenerationMixin`: decoding with the original's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rom.models.generation import Sampling


@dataclass
class InferenceParams:
    """What decoding remembers: the layers' states, and how many tokens they have seen."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Forgets the tokens; the states are zeroed by whoever uses them next."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


class GenerationOutput(NamedTuple):
    """sequences `[batch, length]`; scores: a tuple of `[batch, vocab]`, one per new token."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...]


class GenerationMixin:
    """`generate` for a model that takes inference_params and num_last_tokens."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        teacher_outputs: torch.Tensor | None = None,
        vocab_size: int | None = None,
        streamer: Any = None,
        cg: bool = False,
        enable_timing: bool = False,
    ) -> torch.Tensor | GenerationOutput:
        """Prompt and continuation, `[batch, up to max_length]`, until every sequence has had eos_token_id.

        top_k=1 is greedy, as in the original; 0 keeps all tokens. top_p of 0 or 1 keeps all. cg and enable_timing are
        taken, without effect.
        """
        greedy = top_k == 1
        sampling = Sampling(not greedy, repetition_penalty, temperature, 0 if greedy else top_k, top_p or 1.0, min_p)
        params = InferenceParams(max_length, input_ids.shape[0])
        tokens, scores = input_ids, []
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        if streamer is not None:
            streamer.put(tokens.cpu())
        while tokens.shape[1] < max_length and not bool(finished.all()):
            new = tokens[:, params.seqlen_offset :]
            logits = self(new, inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]  # type: ignore[operator]
            params.seqlen_offset = tokens.shape[1]
            scores.append(logits)
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
            chosen = sampling(logits, seen, None)
            if teacher_outputs is not None and teacher_outputs.shape[1] > tokens.shape[1]:
                chosen = teacher_outputs[:, tokens.shape[1]]
            if eos_token_id is not None:
                chosen = torch.where(finished, eos_token_id, chosen)
                finished |= chosen == eos_token_id
            tokens = torch.cat([tokens, chosen[:, None].to(tokens.dtype)], 1)
            if streamer is not None:
                streamer.put(chosen.cpu())
        if streamer is not None:
            streamer.end()
        return GenerationOutput(tokens, tuple(scores)) if return_dict_in_generate else tokens
