"""Where faults enter: a lane takes the faults of one kind in one layer, and runs the model up to its cut.

| lane | faults | what is patched |
|---|---|---|
| value | results of any layer; sums before the cast where nothing is cast | the golden result |
| operand | inputs of products and convolutions | the golden input, for this layer only |
| memory | weights and biases, one fault at a time | a copy of the memory |
| module | the rest: accumulators, weights per sample, several layers | the operator, as `rom.inject` does |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from rom import dispatch
from rom.campaign.golden import Batch, Kept, Layout
from rom.campaign.restart import Pieces, Program
from rom.faults import records
from rom.faults.inject import Injection, insert, replacement
from rom.faults.layers import Layer, Survey, copied
from rom.faults.plan import FaultPlan
from rom.faults.records import LOG, Target
from rom.ops import _faulty_product as product
from rom.ops.faults import PATCHES
from rom.reference.faults import Extents

#: Results of these products are not cast: before the cast is the result.
WIDE = (torch.float32, torch.float64)


class Lane:
    """Faults of one kind. `head` computes the value at `cut`, where rows that are golden again are dropped."""

    cut: str
    head: Program
    dirty: set[str]
    twice = False  # golden values are computed beside it: its operators round otherwise than the model's


class PatchedLane(Lane, ABC):
    """A lane that changes a dense tensor in place: one that `fresh` copies."""

    def __init__(self, target: Target, extents: Extents, strides: Extents) -> None:
        self.target, self.extents, self.strides = int(target), extents, strides

    @abstractmethod
    def fresh(self, kept: Kept, batch: Batch | None = None) -> torch.Tensor:
        """A copy to change."""

    def patch(
        self, values: torch.Tensor, sites: np.ndarray, extents: Extents | None = None, strides: Extents | None = None
    ) -> np.ndarray:
        """Puts faults into a copy, or a part of one with extents of its own (a site's sample is its row); records of
        dtype LOG."""
        device, log = values.device, np.zeros(len(sites), LOG)
        table = torch.from_numpy(sites.view("<i4").reshape(-1, records.WORDS)).to(device)
        written = torch.from_numpy(log.view("<i4").reshape(-1, 3)).to(device)
        apply = PATCHES[dispatch.choose("faulty_values", device.type)]
        apply(values, table, written, self.target, extents or self.extents, strides or self.strides)
        return log if device.type == "cpu" else records.log_records(written)


class ValueLane(PatchedLane):
    """Results of a layer, or (with `argument`) an operand as this one layer reads it."""

    def __init__(
        self, pieces: Pieces, layer: Layer, target: Target, name: str, layout: Layout, argument: int | None = None
    ) -> None:
        view = channels_last(layer, layout)
        row = product.row_stride_of(view)
        assert row is not None
        cols, column = (view.shape[-1], view.stride(-1)) if view.dim() > 1 else (1, 0)
        rows = view[0].numel() // max(cols, 1)
        if target == Target.A:
            super().__init__(target, (len(view), rows, 0, cols), (view.stride(0), row, 0, column))
        else:
            super().__init__(target, (len(view), rows, cols, 0), (view.stride(0), row, column, 0))
        self.layer, self.result = layer, argument is None
        self.name, self.dirty, self.cut = name, pieces.behind(layer.node), pieces.cut(layer.node)
        if argument is None:
            self.head = pieces.program(self.cut, (name,), self.dirty)
        else:
            self.head = pieces.program(self.cut, (), self.dirty, {layer.node: {argument: "operand"}})

    def fresh(self, kept: Kept, batch: Batch | None = None) -> torch.Tensor:
        """The golden values."""
        assert batch is not None
        return kept.rows(self.name, batch)


def channels_last(layer: Layer, layout: Layout) -> torch.Tensor:
    """A batch of a layer's operand or result as sites count it: sample first, then rows, then the column."""
    view = layout.samples_first(torch.empty_strided(layout.shape, layout.strides, device="meta"))
    return view.movedim(1, -1) if layer.kind.startswith("conv") and Target.A in layer.extents else view


def strided(layer: Layer, layout: Layout) -> bool:
    """Whether its values are apart in memory, and its rows are one stride apart."""
    view = channels_last(layer, layout)
    apart = all(stride or size == 1 for size, stride in zip(view.shape, view.stride()))
    return apart and product.row_stride_of(view) is not None


class MemoryLane(PatchedLane):
    """The weight or the bias of a product or a convolution, wrong for all samples; `fresh` needs no batch."""

    def __init__(self, pieces: Pieces, layer: Layer, target: Target, argument: int, memory: torch.Tensor) -> None:
        extent, self.memory = layer.extents[target], memory.detach()
        if target == Target.BIAS:
            super().__init__(target, (0, 0, extent.cols, 0), (0, 0, memory.stride(0), 0))
        else:
            weight = memory.flatten(1) if layer.kind.startswith("conv") else memory
            weight = weight if layer.kind in ("matmul", "mm", "addmm") else weight.mT
            super().__init__(target, (0, 0, extent.cols, extent.k), (0, 0, weight.stride(1), weight.stride(0)))
        self.dirty, self.cut = pieces.behind(layer.node), pieces.cut(layer.node)
        self.head = pieces.program(self.cut, (), self.dirty, {layer.node: {argument: "memory"}})

    def fresh(self, kept: Kept, batch: Batch | None = None) -> torch.Tensor:
        """The golden memory."""
        return self.memory.clone()


class ModuleLane(Lane):
    """The layers replaced by faulty operators."""

    def __init__(
        self, pieces: Pieces, found: Survey, plan: FaultPlan, names: Sequence[str], options: dict[str, Any], whole: bool
    ) -> None:
        graph = fx.GraphModule(pieces.graph, copied(pieces.graph.graph))
        nodes = {node.name: node for node in graph.graph.nodes}
        self.injections: dict[str, Injection] = {}
        replaced: dict[str, str] = {}
        for number, name in enumerate(dict.fromkeys(found.layer(name).node for name in names)):
            peers = [layer for layer in found if layer.node == name and layer.name in names]
            targets = {stratum.target for stratum in plan.strata if stratum.layer in names}
            module = replacement(nodes[name], peers, options, targets, self.injections)
            replaced[insert(graph, nodes[name], f"faults_{number}", module).name] = name
        variant = Pieces(graph, pieces.places, pieces.constants)
        for injection in self.injections.values():
            injection.to(next(pieces.graph.parameters(), torch.zeros(0)).device)
        self.dirty = set().union(*(variant.behind(start) for start in replaced))
        end = variant.end if whole else variant.cut(next(iter(replaced)))
        self.cut = replaced.get(end, end)  # the faulty value is compared with the one it stands for
        if self.cut not in pieces.places:
            end, self.cut = variant.end, pieces.end
        self.head = variant.program(end, (), self.dirty)

    def arm(self, sites: np.ndarray, names: np.ndarray) -> None:
        """Chooses the faults of the next run of `head`; `names` are the layers of the sites."""
        for name, injection in self.injections.items():
            injection.arm(sites[names == name])

    def log(self, names: np.ndarray) -> np.ndarray:
        """What the last run did to each site."""
        log = np.zeros(len(names), LOG)
        for name, injection in self.injections.items():
            mine = names == name
            log[mine] = records.log_records(injection.written)[: int(mine.sum())]
        return log
