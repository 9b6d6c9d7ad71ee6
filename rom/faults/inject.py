"""`inject`: a model with the faults of a plan in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rom.faults import records
from rom.faults.layers import Layer, Survey, copied, own_buffers, survey
from rom.faults.plan import FaultPlan, Faults
from rom.faults.records import LOG, SITE, Target
from rom.ops.faults import faulty_matmul, faulty_values, restrict

#: A row of `InjectedModel.log()`: the stratum, the site as planned, what happened to it.
ENTRY = np.dtype([("stratum", "<i4"), *SITE.descr, *LOG.descr])
LEAST = 32  # rows of a table of sites; it grows by powers of two, so that a compiled model meets few shapes


class Injection(nn.Module):
    """The faults of one layer: their table, and the log of the last call."""

    sites: torch.Tensor
    written: torch.Tensor

    def __init__(self, layer: Layer, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.place, self.options = layer, layer.places[0], options
        self.register_buffer("sites", table_of(np.zeros(0, SITE)), persistent=False)
        self.register_buffer("written", torch.zeros(LEAST, 3, dtype=torch.int32), persistent=False)

    def arm(self, sites: np.ndarray) -> None:
        """Replaces the table; in place where its size stays, as compiled graphs want it."""
        with torch.inference_mode(False):
            table = table_of(self.local(sites)).to(self.sites.device)
            if table.shape == self.sites.shape:
                self.sites.copy_(table)
                self.written.zero_()
            else:
                self.sites, self.written = table, table.new_zeros(len(table), 3)

    def local(self, sites: np.ndarray) -> np.ndarray:
        """The sites in the coordinates of the operator that applies them."""
        return sites

    def done(self, y: torch.Tensor, *logs: torch.Tensor) -> torch.Tensor:
        """Keeps the log; several operators each know some of the sites."""
        if y.dtype != self.layer.dtype:
            raise TypeError(
                f"rom.inject: layer {self.layer.name!r} computes in {y.dtype}, the plan was made for "
                f"{self.layer.dtype}. Survey the model under the autocast it runs under."
            )
        with torch.no_grad():
            self.written.copy_(logs[0] if len(logs) == 1 else torch.stack(logs).sum(0))
        return y


class Product(Injection):
    """linear, mm, matmul, bmm, addmm."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the call it stands for takes."""
        b = weight.mT if self.layer.kind == "linear" else weight
        b = b if b.dim() == 2 else self.place.samples_first(b)
        y, log = faulty_matmul(self.place.samples_first(x), b, self.sites, bias, **self.options)
        return self.done(self.place.back(y), log)


class Value(Injection):
    """The result of any layer."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer computed."""
        faulty, log = faulty_values(self.place.samples_first(y), self.sites, grad=self.options["grad"])
        return self.done(self.place.back(faulty), log)


class Convolution(Injection):
    """The library's convolution of faulty operands."""

    def __init__(self, layer: Layer, options: dict[str, Any], call: Any, targets: set[Target]) -> None:
        super().__init__(layer, options)
        self.call, self.targets = call, targets

    def _patched(self, x: torch.Tensor, target: Target, logs: list[torch.Tensor]) -> torch.Tensor:
        """x `[S, ..., C]` with one target's sites, in a table of its own that calls them OUTPUT."""
        if target not in self.targets:
            return x
        table = self.sites.clone()
        mine = table[:, 6] & 0xFFFF == int(target)  # a plain int: dynamo takes no enum here
        table[:, 6] = torch.where(mine, (table[:, 6] & ~0xFFFF) | int(Target.OUTPUT), records.NO_TARGET)
        if target == Target.A:  # col is the channel
            table[:, 2] = table[:, 3]
        if target in (Target.B, Target.BIAS):  # one sample, the memory; a row per k
            table[:, 0] = torch.where(table[:, 0] == -1, 0, table[:, 0] * 0 - 2)
            table[:, 1] = table[:, 3] if target == Target.B else 0
        y, log = faulty_values(x, table, grad=self.options["grad"])
        logs.append(log)
        return y

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any = None, *rest: Any, **more: Any) -> torch.Tensor:
        """What the call it stands for takes."""
        logs: list[torch.Tensor] = []
        x = self._patched(x.movedim(1, -1), Target.A, logs).movedim(-1, 1)
        weight = self._patched(weight.flatten(1).mT[None], Target.B, logs)[0].mT.reshape(weight.shape)
        if bias is not None:
            bias = self._patched(bias[None], Target.BIAS, logs)[0]
        y = self.call(x, weight, bias, *rest, **more)
        return self.done(self._patched(y.movedim(1, -1), Target.OUTPUT, logs).movedim(-1, 1), *logs)


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V with its two products as layers."""

    def __init__(self, scores: Injection | None, values: Injection | None) -> None:
        super().__init__()
        self.scores, self.values = scores, values

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        """What `scaled_dot_product_attention` takes, without mask and dropout."""
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest)) | more
        scale = options.get("scale") or 1 / math.sqrt(q.shape[-1])
        scores = self._product(self.scores, q, k.mT) * scale
        if options.get("is_causal"):
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self._product(self.values, scores.softmax(-1), v)

    @staticmethod
    def _product(injection: Injection | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if injection is None:
            return a @ b
        y, log = faulty_matmul(a.contiguous(), b, injection.sites, **injection.options)
        return injection.done(y, log)


class Restrict(nn.Module):
    """Range restriction of one layer's result."""

    def __init__(self, bounds: tuple[float, float], nan_to: str) -> None:
        super().__init__()
        self.bounds, self.nan_to = bounds, nan_to

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer computed."""
        return restrict(y, self.bounds, self.nan_to)


class InjectedModel(nn.Module):
    """A model with faults in it; made by `rom.inject`. Its parameters are the original's own objects."""

    def __init__(self, graph: fx.GraphModule, plan: FaultPlan, injections: dict[str, Injection]) -> None:
        super().__init__()
        self.graph, self.plan = graph, plan
        self._injections = injections  # a plain dict: they are modules of the graph already
        self._hit: set[str] = set()
        self._armed = Faults(np.zeros(0, np.int32), np.zeros(0, SITE))
        self._layer_of = np.array([s.layer for s in plan.strata], object)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the model takes."""
        return self.graph(*inputs)

    def arm(self, faults: Faults | None = None, first_sample: int = 0) -> None:
        """Chooses the faults of the next calls: some of the plan's (`plan[i:j]`), or all.

        A site of sample s hits row s − first_sample of a batch; samples that are not in it are not hit. So the same
        faults hit the same samples whatever the batch size is.
        """
        chosen = self.plan[:] if faults is None else faults
        sites = chosen.sites.copy()
        sample = sites["sample"].astype(np.int64)
        everywhere = sample == records.ALL
        sites["sample"] = np.where(sample >= first_sample, sample - first_sample, records.NOWHERE)
        sites["sample"][everywhere] = records.ALL
        self._arm(chosen, sites)

    def arm_rows(self, faults: Faults) -> None:
        """Fault j hits row j of the next batches, whatever its sample is: many faults in one pass.

        A weight of a linear layer is wrong for that row only. ValueError: a bias, or a weight of a convolution.
        """
        ids = faults.sites["fault_id"].astype(np.int64)
        if self.plan.scheme in ("stratified", "exhaustive"):  # numbered within their stratum
            ids = ids * len(self.plan.strata) + faults.stratum
        sites = faults.sites.copy()
        for number in np.unique(faults.stratum):
            stratum = self.plan.strata[number]
            if not self._injections[stratum.layer].layer.extents[stratum.target].own:
                raise ValueError(
                    f"rom.inject: {stratum.target.name} of layer {stratum.layer!r} is one memory for all rows of a "
                    "batch. Arm one such fault at a time with `arm`."
                )
        sites["sample"] = np.cumsum(np.r_[0, np.diff(ids) != 0]) if len(ids) else 0
        self._arm(faults, sites)

    def _arm(self, faults: Faults, sites: np.ndarray) -> None:
        self._armed = faults
        names = self._layer_of[faults.stratum]
        for name, injection in self._injections.items():
            mine = sites[names == name]
            if len(mine) or name in self._hit:  # a campaign arms a layer of fifty at a time
                injection.arm(mine)
        self._hit = set(names)

    def log(self) -> np.ndarray:
        """What the last call did, records of dtype `rom.faults.inject.ENTRY`: a row per armed site, in their order."""
        entries = np.zeros(len(self._armed.sites), ENTRY)
        entries["stratum"] = self._armed.stratum
        names = self._layer_of[self._armed.stratum]
        for field in SITE.names or ():
            entries[field] = self._armed.sites[field]
        for name, injection in self._injections.items():
            mine = names == name
            logged = records.log_records(injection.written)[: int(mine.sum())]
            for field in LOG.names or ():
                entries[field][mine] = logged[field]
        return entries


def inject(
    model: nn.Module | Survey,
    plan: FaultPlan,
    *example: torch.Tensor,
    mode: str = "exact",
    grad: str = "true",
    persistence: str = "transient",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    nan_to: str = "max",
) -> InjectedModel:
    """A copy of a model's graph in which the layers of a plan are faulty operators, armed with all its faults.

    The model is not changed, and any number of injected models may exist beside it; they share its parameters, which
    receive the gradients, and copy its buffers. Works in eager mode, inference_mode and autocast, and under
    torch.compile, before or after (a compiled model is taken as what it was compiled from).

    Args:
        model: any that `torch.export` traces, or its `rom.faults.survey`, which saves tracing it again.
        plan: its strata name layers as the survey does.
        example: inputs to trace the model with; none for a survey.
        mode, grad, persistence: of `rom.ops.faulty_matmul`.
        bounds: (low, high) by layer, as from `Survey.profile`: range restriction of these layers' results, faulty or
            not. nan_to: what becomes of NaN there.

    Raises:
        ValueError: a layer, target or extent of the plan that the model does not have.

    >>> from rom import faults
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), torch.randn(3, 4)
    >>> found = faults.survey(net, x)
    >>> plan = faults.FaultPlan.simple(found.strata(samples=3), n=5, seed=0)
    >>> faulty = rom.inject(found, plan)
    >>> y = faulty(x)
    >>> faulty.log()["status"]
    array([1, 1, 1, 1, 1], dtype=int32)
    """
    found = model if isinstance(model, Survey) else survey(model, *example)
    check_plan(found, plan)
    options = {"mode": mode, "grad": grad, "persistence": persistence}
    graph = own_buffers(fx.GraphModule(found.graph, copied(found.graph.graph)))
    nodes = {node.name: node for node in graph.graph.nodes}
    injections: dict[str, Injection] = {}
    hit = {s.layer for s in plan.strata}
    for number, layer in enumerate(found.layers):
        if layer.name in hit and layer.name not in injections:
            peers = [other for other in found.layers if other.node == layer.node and other.name in hit]
            targets = {s.target for s in plan.strata if s.layer == layer.name}
            module = replacement(nodes[layer.node], peers, options, targets, injections)
            nodes[layer.node] = insert(graph, nodes[layer.node], f"faults_{number}", module)
    for number, (name, pair) in enumerate((bounds or {}).items()):
        layer = found.layer(name)
        nodes[layer.node] = insert(graph, nodes[layer.node], f"bounds_{number}", Restrict(pair, nan_to))
    graph.recompile()
    device = next(graph.parameters(), torch.zeros(0)).device
    injected = InjectedModel(graph, plan, injections).to(device)
    injected.arm()
    return injected


def check_plan(found: Survey, plan: FaultPlan) -> None:
    """ValueError for a layer, target or extent the model does not have."""
    for stratum in plan.strata:
        layer = found.layer(stratum.layer)
        extent = layer.extents.get(stratum.target)
        if extent is None:
            offered = ", ".join(target.name for target in layer.extents)
            raise ValueError(f"rom.inject: layer {layer.name!r} has {offered}, got a stratum of {stratum.target.name}.")
        if stratum.dtype != extent.dtype:
            raise ValueError(f"rom.inject: layer {layer.name!r} has {extent.dtype} there, got {stratum.dtype}.")
        if stratum.samples is not None and not extent.own:
            raise ValueError(
                f"rom.inject: {stratum.target.name} of {layer.name!r} is one memory, got a fault per sample."
            )
        names = [name for name in stratum.coordinates if name != "sample"]
        sizes = [(name if name == "k" else f"{name}s") for name in names]
        for size in sizes:
            if getattr(stratum, size) > getattr(extent, size):
                expected, got = getattr(extent, size), getattr(stratum, size)
                raise ValueError(f"rom.inject: layer {layer.name!r} has {size} {expected}, got a stratum of {got}.")


def replacement(
    node: fx.Node,
    layers: list[Layer],
    options: dict[str, Any],
    targets: set[Target],
    injections: dict[str, Injection],
) -> nn.Module:
    """The module that stands for a node's call, or that changes its result."""
    first = layers[0]
    if first.kind == "attention" and Target.A in first.extents:
        parts = {layer.name.rpartition(".")[2].partition("#")[0]: Injection(layer, options) for layer in layers}
        injections.update({layer.name: part for layer, part in zip(layers, parts.values())})
        return Attention(parts.get("scores"), parts.get("values"))
    module: Injection
    if first.kind.startswith("conv") and Target.A in first.extents:
        module = Convolution(first, options, node.target, targets)
    elif Target.A in first.extents:
        module = Product(first, options)
    else:
        module = Value(first, options)
    injections[first.name] = module
    return module


def insert(graph: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Calls the module instead of the node, or on its result."""
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(node):
        if isinstance(module, (Value, Restrict)):
            new = graph.graph.call_module(name, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        else:
            args = node.args
            if isinstance(module, Product) and module.layer.kind == "addmm":  # its bias comes first
                args = (*args[1:], args[0])
            new = graph.graph.call_module(name, args, dict(node.kwargs))
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    return new


def table_of(sites: np.ndarray) -> torch.Tensor:
    """Sites, and rows of no target up to a power of two."""
    padded = np.zeros(max(LEAST, 1 << max(len(sites) - 1, 0).bit_length()), SITE)
    padded["target"] = records.NO_TARGET
    padded[: len(sites)] = sites
    return records.to_tensor(padded)
