"""Language modelling as a task for the trainer: next-byte loss, and bits per byte on the whole validation split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rom.training.data import Batches, scored_windows


class LanguageModelling:
    """A causal language model of bytes: `model(input_ids, labels=…)` returns an object with `.loss` and `.logits`.

    Args:
        batches: where training batches come from.
        validation: `[N]` uint8, the whole validation split.
        window: bytes the model reads at once when it is validated. Windows advance by three quarters of it, so that
            every byte is predicted exactly once, from at least a quarter of a window of bytes before it (the bytes of
            the first window from all there are).
        batch_size: windows per forward pass.
    """

    criterion = "bits_per_byte"
    unit = "bytes"

    def __init__(self, batches: Batches, validation: np.ndarray, window: int, batch_size: int) -> None:
        self.batches, self.validation, self.batch_size = batches, validation, batch_size
        self.window, self.stride = window, max(1, window - window // 4)

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step, a pure function of the step."""
        return self.batches.batch(step)

    def size(self, batch: torch.Tensor) -> int:
        """Bytes in a batch."""
        return batch.numel()

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats per byte, with the model's auxiliary terms if it has any."""
        return model(batch, labels=batch).loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over every byte of the validation split but the first."""
        device = next(model.parameters()).device
        windows = list(scored_windows(len(self.validation), self.window, self.stride))
        nats = 0.0
        for first in range(0, len(windows), self.batch_size):
            nats += self._nats(model, windows[first : first + self.batch_size], device)
        return {self.criterion: nats / (len(self.validation) - 1) / math.log(2)}

    def _nats(self, model: nn.Module, windows: list[tuple[int, int, int]], device: torch.device) -> float:
        """Summed over the scored bytes. Short windows (only the last is) are padded behind, which causality ignores."""
        length = max(stop - start for start, stop, _ in windows)
        tokens = np.zeros((len(windows), length), dtype=np.int64)
        targets = np.full((len(windows), length - 1), -100)
        for row, (start, stop, scored) in enumerate(windows):
            tokens[row, : stop - start] = self.validation[start:stop]
            targets[row, stop - start - 1 - scored : stop - start - 1] = self.validation[stop - scored : stop]
        logits = model(torch.from_numpy(tokens).to(device)).logits[:, :-1]
        wanted = torch.from_numpy(targets).to(device)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum").item()

    def statistics(self, model: nn.Module) -> dict[str, Any]:
        """For the log: the fraction of tokens each expert of each layer got in the last batch, if there are experts."""
        measure = getattr(model, "load_statistics", None)
        statistics = measure() if measure else None
        return {} if statistics is None else {"load": statistics.fraction.tolist()}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model's own files (`config.json`, `model.safetensors`)."""
        model.save_pretrained(folder)  # type: ignore[operator]
