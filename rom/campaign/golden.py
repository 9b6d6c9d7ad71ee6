"""The run without faults, and what it keeps: the values at which the runs with faults begin again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from rom.campaign.restart import Pieces
from rom.faults.layers import Place


class Layout:
    """A batch's value as the model laid it out: another layout may be summed in another order."""

    def __init__(self, example: torch.Tensor, place: Place) -> None:
        self.place, self.shape, self.strides = place, example.shape, example.stride()
        self.plain = place == Place(0) and example.is_contiguous()
        self.bytes = example.numel() * example.element_size()

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (samples first) as the model lays them out."""
        if self.plain:
            return rows
        value = torch.empty_strided(self.shape, self.strides, dtype=rows.dtype, device=rows.device)
        self.place.samples_first(value).copy_(rows)
        return value

    def samples_first(self, value: torch.Tensor) -> torch.Tensor:
        """The samples as the first dimension."""
        return value if self.plain else self.place.samples_first(value)


class Batch(NamedTuple):
    """Which samples a batch has: row by row, the same on the device, and where their values are kept."""

    samples: np.ndarray
    on_device: torch.Tensor
    slots: torch.Tensor


class Kept:
    """Values of the golden run for as many samples at a time as `memory` bytes hold.

    A sample is always computed in the same row of the same batch, so its values are the same bits every time.
    """

    def __init__(
        self,
        pieces: Pieces,
        shapes: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        names: Iterable[str],
        batch: int,
        memory: int,
    ) -> None:
        self.inputs, self.batch = inputs, batch
        (self.source,) = (node.name for node in pieces.order if node.op == "placeholder")
        self.names = [name for name in dict.fromkeys(names) if name != self.source]
        self.program = pieces.program((pieces.end, *self.names), (self.source,), pieces.nodes)
        self.layouts = {name: Layout(shapes[name], pieces.places[name]) for name in (*self.names, self.source)}
        self.values: dict[str, torch.Tensor] = {}
        self.bytes = sum(self.layouts[name].bytes for name in self.names)  # of a batch
        self.capacity = min(-(-len(inputs) // batch), max(1, memory // max(self.bytes, 1)))
        self.slot = np.full(len(inputs), -1)

    def _batch(self, chunk: int) -> torch.Tensor:
        """A chunk of the inputs; the last one is filled up with its last sample."""
        first = chunk * self.batch
        rows = torch.arange(first, first + self.batch).clamp(max=len(self.inputs) - 1)
        return self.inputs.index_select(0, rows.to(self.inputs.device))

    def _run(self, chunk: int) -> tuple[torch.Tensor, ...]:
        return self.program.run(self._batch(chunk))

    def everything(self) -> torch.Tensor:
        """Runs all samples and returns their logits; keeps the values if they fit."""
        fits = self.capacity * self.batch >= len(self.inputs)
        chunks = list(range(-(-len(self.inputs) // self.batch)))
        groups = [chunks] if fits else [[c] for c in chunks]
        logits = [rows for group in groups for rows in self.load(group)]
        return torch.cat(logits)[: len(self.inputs)]

    def groups(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Makes the values of these samples present, group by group: a mask over all samples each time."""
        if len(samples) and (self.slot[samples] >= 0).all():
            yield self.slot >= 0
            return
        wanted = np.unique(samples // self.batch)
        for i in range(0, len(wanted), self.capacity):
            self.load(wanted[i : i + self.capacity].tolist())
            yield self.slot >= 0

    def load(self, chunks: list[int]) -> list[torch.Tensor]:
        """Computes and keeps these chunks instead of what was kept; returns their logits."""
        self.slot[:] = -1
        logits = []
        for place, chunk in enumerate(chunks):
            result, *values = self._run(chunk)
            logits.append(result)
            first = chunk * self.batch
            present = np.arange(first, min(first + self.batch, len(self.inputs)))
            self.slot[present] = place * self.batch + present - first
            for name, value in zip(self.names, values):
                rows = self.layouts[name].samples_first(value)
                if name not in self.values:
                    self.values[name] = rows.new_empty(self.capacity * self.batch, *rows.shape[1:])
                self.values[name][place * self.batch : (place + 1) * self.batch] = rows
        return logits

    def batch_of(self, samples: np.ndarray, rows: np.ndarray, size: int = 0) -> Batch:
        """These samples in these rows of `size` (of a batch); the rest is filled with the first of them, for nobody to
        look at."""
        full = np.full(size or self.batch, samples[0], np.int64)
        full[rows] = samples
        device = self.inputs.device
        return Batch(full, torch.from_numpy(full).to(device), torch.from_numpy(self.slot[full]).to(device))

    def rows(self, name: str, batch: Batch) -> torch.Tensor:
        """The golden values of a batch, as the model lays it out; a copy."""
        return self.layouts[name].batch(self.plain_rows(name, batch))

    def plain_rows(self, name: str, batch: Batch) -> torch.Tensor:
        """The golden values of a batch, samples first."""
        if name == self.source:
            return self.inputs.index_select(0, batch.on_device)
        return self.values[name].index_select(0, batch.slots)
