"""The receptive cone: a wrong pixel spreads by a window at a time, so only windows of convolutions are computed.

A window is a block of pixels of a value, of one size for all rows of a batch and in a place of its own in each. What
lies around it is golden. A segment takes windows from one cut to the next; where the windows have grown to a third of
the picture, or an operation is no function of windows, they are put into the golden values and the model goes on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from rom.campaign.golden import Batch, Kept
from rom.campaign.outcomes import bits
from rom.campaign.restart import Pieces, kind_of
from rom.faults.layers import Place

POINTWISE = ("relu", "batch_norm", "add", "sub", "mul", "dropout", "hardtanh", "clamp", "relu6", "leaky_relu", "silu")
# Of the picture. ResNet-18 on 32 × 32: 2.43 ms a fault; 2.77 at 0.1, 2.55 at 0.5, 3.85 without windows.
LARGEST = 0.35
ROWS = 64  # windows at a time: a batch of one picture would pay for calls, not for products


class Windows(NamedTuple):
    """A batch of windows `[B, C, h, w]` whose first pixels are at (y, x), int64 `[B]`."""

    values: torch.Tensor
    y: np.ndarray
    x: np.ndarray

    def choose(self, index: np.ndarray) -> Windows:
        """Some rows."""
        return Windows(self.values[torch.from_numpy(index)], self.y[index], self.x[index])


class Spread(NamedTuple):
    """How windows pass a convolution: kernel, stride, padding and the sizes before and after, for one dimension."""

    kernel: int
    stride: int
    padding: int
    size: int
    size_out: int
    limit: int

    def __call__(self, first: np.ndarray) -> np.ndarray:
        """The first output pixel that input pixels from `first` on reach."""
        reached = -((self.kernel - 1 - self.padding - first) // self.stride)
        return np.clip(reached, 0, self.limit - self.size_out)


def spread(kernel: int, stride: int, padding: int, size: int, limit: int) -> Spread:
    """limit: how many output pixels there are."""
    return Spread(kernel, stride, padding, size, min((size + kernel - 2) // stride + 1, limit), limit)


class Segment:
    """Windows of `start` become windows of `end`.

    `steps`: the nodes between, how windows spread in each (None: pointwise), and which of its sources are windows.
    """

    def __init__(self, pieces: Pieces, shapes: dict[str, torch.Tensor], start: str, end: str, size: tuple[int, int]):
        self.pieces, self.shapes, self.start, self.end = pieces, shapes, start, end
        self.sizes = {start: size}
        self.steps: list[tuple[fx.Node, tuple[Spread, Spread] | None, str]] = []
        self.needs = {start, end}
        inner = pieces.behind(start) & pieces.before(end)
        for node in pieces.order:
            if node.name in inner and node.name != start and not self._add(node):
                self.steps.clear()
                break
        self.suitable = bool(self.steps) or start == end
        if self.suitable:
            area = float(np.prod(self.sizes[end]) / np.prod(shapes[end].shape[2:]))
            self.suitable = area <= LARGEST and self._covers()

    def _add(self, node: fx.Node) -> bool:
        """Enters a node; False if it is no function of windows."""
        shape = self.shapes[node.name].shape if node.name in self.shapes else ()
        if len(shape) != 4 or self.pieces.places.get(node.name, Place(0)) != Place(0):
            return False
        dirty = [source.name for source in node.all_input_nodes if source.name in self.sizes]
        if kind_of(node) in ("conv2d", "max_pool2d"):
            return dirty == [node.all_input_nodes[0].name] and self._add_spreading(node, dirty[0], shape)
        return self._add_pointwise(node, dirty, shape)

    def _add_spreading(self, node: fx.Node, source: str, shape: torch.Size) -> bool:
        pool = kind_of(node) == "max_pool2d"
        kernel = _pair(node, 1, 0) if pool else self.argument(node, 1).shape[2:]
        stride, padding, dilation = (_pair(node, i - pool, default) for i, default in ((3, 1), (4, 0), (5, 1)))
        ceil_mode = pool and len(node.args) > 5 and node.args[5]
        if kernel is None or stride is None or padding is None or dilation != (1, 1) or ceil_mode:
            return False
        spreads = [spread(*a) for a in zip(kernel, stride, padding, self.sizes[source], shape[2:])]
        self.sizes[node.name] = spreads[0].size_out, spreads[1].size_out
        self.steps.append((node, (spreads[0], spreads[1]), source))
        self.needs.add(source)
        return True

    def _add_pointwise(self, node: fx.Node, dirty: list[str], shape: torch.Size) -> bool:
        kind, bounds = kind_of(node), node.op == "call_module" and str(node.target).startswith("bounds")
        if (kind not in POINTWISE and not bounds) or (kind == "batch_norm" and node.args[5] is not False):
            return False
        clean = [source for source in node.all_input_nodes if source.name not in dirty and source.op != "get_attr"]
        clean = [source for source in clean if source.name not in self.pieces.constants]
        if any(source.name not in self.shapes or self.shapes[source.name].shape != shape for source in clean):
            return False
        largest = max(dirty, key=lambda name: int(np.prod(self.sizes[name])))
        self.sizes[node.name] = self.sizes[largest]
        self.steps.append((node, None, largest))
        self.needs |= {source.name for source in clean} | (set(dirty) if len(dirty) > 1 else set())
        return True

    def _covers(self) -> bool:
        """Whether every window holds those of its sources, from wherever the first one starts."""
        limits = self.shapes[self.start].shape[2:]
        for axis in (0, 1):
            first = {self.start: np.arange(limits[axis] - self.sizes[self.start][axis] + 1)}
            for node, spreads, source in self.steps:
                first[node.name] = spreads[axis](first[source]) if spreads else first[source]
                for other in node.all_input_nodes if not spreads else ():
                    if other.name in first:
                        begin, end = first[other.name], first[other.name] + self.sizes[other.name][axis]
                        mine = first[node.name]
                        if (begin < mine).any() or (end > mine + self.sizes[node.name][axis]).any():
                            return False
        return True

    def run(self, windows: Windows, kept: Kept, batch: Batch) -> Windows:
        """The windows of `end`."""
        known = {self.start: windows}
        for node, spreads, source in self.steps:
            given = known[source]
            if spreads:
                y, x = spreads[0](given.y), spreads[1](given.x)
                kernels = [(s.size_out - 1) * s.stride + s.kernel for s in spreads]
                corners = (y * spreads[0].stride - spreads[0].padding, x * spreads[1].stride - spreads[1].padding)
                pool = kind_of(node) == "max_pool2d"
                patch = blended(kept, source, batch, corners, kernels, given, float("-inf") if pool else 0.0)
                stride = spreads[0].stride, spreads[1].stride
                if pool:
                    values = torch.max_pool2d(patch, (spreads[0].kernel, spreads[1].kernel), stride)
                else:
                    weight, bias = (self.argument(node, i) for i in (1, 2))
                    groups: Any = node.args[6] if len(node.args) > 6 else 1
                    values = torch.conv2d(patch, weight, bias, stride, 0, 1, groups)
            else:
                y, x = given.y, given.x

                def value(n: fx.Node, y: np.ndarray = y, x: np.ndarray = x, size: Any = self.sizes[source]) -> Any:
                    if n.name in known:
                        mine = known[n.name]
                        if mine.values.shape[2:] == size and (mine.y == y).all() and (mine.x == x).all():
                            return mine.values
                        return blended(kept, n.name, batch, (y, x), size, mine)
                    if n.op == "get_attr" or n.name in self.pieces.constants:
                        return self.pieces.value(n)
                    return blended(kept, n.name, batch, (y, x), size)

                args: Any = fx.node.map_arg(node.args, value)
                kwargs: Any = fx.node.map_arg(node.kwargs, value)
                module = self.pieces.graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
                values = module(*args, **kwargs)  # type: ignore[operator]
            known[node.name] = Windows(values, y, x)
        return known[self.end]

    def argument(self, node: fx.Node, index: int) -> Any:
        """A parameter of a call, None where it has none."""
        argument = node.args[index] if len(node.args) > index else None
        return self.pieces.value(argument) if isinstance(argument, fx.Node) else argument


def _pair(node: fx.Node, index: int, default: int) -> tuple[int, int] | None:
    value: Any = node.args[index] if len(node.args) > index else default
    if isinstance(value, str):
        return None
    values = [value, value] if isinstance(value, int) else list(value)
    return (values[0], values[-1]) if len(values) <= 2 else None


def blended(
    kept: Kept, name: str, batch: Batch, corner: Any, size: Any, windows: Windows | None = None, fill: float = 0.0
) -> torch.Tensor:
    """Blocks `[B, C, h, w]` of golden values from `corner` on, with windows put over them; `fill` outside."""
    golden = kept.inputs if name == kept.source else kept.values[name]
    slots = batch.on_device if name == kept.source else batch.slots
    _, channels, height, width = golden.shape
    y, x = (c[:, None] + np.arange(n) for c, n in zip(corner, size))
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    pixels = y.clip(0, height - 1)[:, :, None] * width + x.clip(0, width - 1)[:, None, :]
    flat = torch.from_numpy(pixels.reshape(len(y), 1, -1)).to(golden.device)
    index = (slots * (channels * height * width)).view(-1, 1, 1) + flat
    values = golden.take(index + torch.arange(channels, device=golden.device).view(-1, 1) * (height * width))
    if windows is not None:
        h, w = windows.values.shape[2:]
        wy, wx = y - windows.y[:, None], x - windows.x[:, None]
        over = ((wy >= 0) & (wy < h))[:, :, None] & ((wx >= 0) & (wx < w))[:, None, :]
        place = wy.clip(0, h - 1)[:, :, None] * w + wx.clip(0, w - 1)[:, None, :]
        place = torch.from_numpy(place.reshape(len(y), 1, -1)).to(golden.device).expand(values.shape)
        mask = torch.from_numpy(over.reshape(len(y), 1, -1)).to(golden.device)
        values = torch.where(mask, windows.values.flatten(2).gather(2, place), values)
    if not inside.all():
        values.masked_fill_(torch.from_numpy(~inside.reshape(len(y), 1, -1)).to(golden.device), fill)
    return values.view(len(y), channels, *size)


def whole(kept: Kept, name: str, batch: Batch, windows: Windows) -> torch.Tensor:
    """The golden values of a batch with windows in them."""
    values = kept.rows(name, batch)
    h, w = windows.values.shape[2:]
    pixels = (windows.y[:, None] + np.arange(h))[:, :, None] * values.shape[3] + (
        windows.x[:, None] + np.arange(w))[:, None, :]  # fmt: skip
    index = torch.from_numpy(pixels.reshape(len(pixels), 1, -1)).to(values.device)
    source = windows.values.flatten(2)
    values.view(*values.shape[:2], -1).scatter_(2, index.expand(source.shape), source)
    return values


def _alike(segment: Segment, node: fx.Node, spreads: tuple[Spread, Spread], source: str) -> bool:
    shape, rng = segment.shapes[source], np.random.default_rng(0)
    device = segment.pieces.value(node.args[1]).device  # type: ignore[arg-type]
    x = torch.from_numpy(rng.standard_normal(shape.shape)).to(device, shape.dtype)
    weight, bias = (segment.argument(node, i) for i in (1, 2))
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    stride, padding = ([getattr(s, name) for s in spreads] for name in ("stride", "padding"))
    everything = torch.conv2d(x, weight, bias, stride, padding, 1, groups)
    padded = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    blocks, expected = [], []
    for row in range(ROWS):
        y, z = (int(rng.integers(s.limit - s.size_out + 1)) for s in spreads)
        ends = [(s.size_out - 1) * s.stride + s.kernel for s in spreads]
        top, left = y * stride[0], z * stride[1]
        blocks.append(padded[row % len(x), :, top : top + ends[0], left : left + ends[1]])
        expected.append(everything[row % len(x), :, y : y + spreads[0].size_out, z : z + spreads[1].size_out])
    got = torch.conv2d(torch.stack(blocks), weight, bias, stride, 0, 1, groups)
    return torch.equal(bits(got), bits(torch.stack(expected)))


def rehearsed(segment: Segment, kept: Kept, trial: Batch) -> bool:
    """Whether golden windows give golden windows, bit for bit, at the corners, the edges and inside; and convolutions
    of random windows the bits of the whole: golden values are often 0, whose sums round alike in any order."""
    for node, spreads, source in segment.steps:
        if spreads and kind_of(node) == "conv2d" and not _alike(segment, node, spreads, source):
            return False
    sizes, rng = segment.sizes[segment.start], np.random.default_rng(0)
    corners = []
    for axis, size in enumerate(sizes):
        last = segment.shapes[segment.start].shape[2 + axis] - size
        corners.append(rng.integers(0, last + 1, ROWS))
        corners[-1][: ROWS // 4] = 0
        corners[-1][ROWS // 4 : ROWS // 2] = last
        rng.shuffle(corners[-1])
    start = Windows(blended(kept, segment.start, trial, corners, sizes), *corners)
    end = segment.run(start, kept, trial)
    golden = blended(kept, segment.end, trial, (end.y, end.x), segment.sizes[segment.end])
    return torch.equal(bits(end.values), bits(golden))
