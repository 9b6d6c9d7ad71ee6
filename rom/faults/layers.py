"""`survey`: where in a model faults can be, found in its exported graph, so that functional calls count as well."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from rom.faults.population import Stratum
from rom.faults.records import DTYPES, Target

GEMMS = ("linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "conv3d", "attention")
_ACCUMULATOR = {torch.float64: "float64"}  # float32 for the rest


class Place(NamedTuple):
    """Where the samples are in a tensor: all of a dimension, or its outer or inner part."""

    dim: int
    parts: int = 1  # the dimension has samples × parts elements
    outer: bool = True

    def samples_first(self, x: torch.Tensor) -> torch.Tensor:
        """The samples as the first dimension."""
        if self.parts == 1:
            return x.movedim(self.dim, 0)
        sizes = (-1, self.parts) if self.outer else (self.parts, -1)
        return x.unflatten(self.dim, sizes).movedim(self.dim + (not self.outer), 0)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `samples_first`."""
        if self.parts == 1:
            return x.movedim(0, self.dim)
        return x.movedim(0, self.dim + (not self.outer)).flatten(self.dim, self.dim + 1)


class Extent(NamedTuple):
    """What a target of a layer offers: see `Stratum`."""

    dtype: str
    rows: int = 1
    cols: int = 1
    k: int = 1
    shared: bool = False  # memory of all samples
    own: bool = True  # a site may name one sample


@dataclass(frozen=True)
class Layer:
    """A call in the model's graph that produces a floating tensor."""

    name: str
    kind: str  # the function: "linear", "conv2d", "relu", …
    node: str
    places: tuple[Place, ...]  # of the operands with samples
    extents: dict[Target, Extent] = field(compare=False)
    dtype: torch.dtype = torch.float32  # of the result


@dataclass(frozen=True)
class Survey:
    """A model's graph and the layers in it, in the order in which they run. Iterate over it for the layers."""

    graph: fx.GraphModule
    layers: tuple[Layer, ...]

    def __iter__(self) -> Any:
        return iter(self.layers)

    def strata(
        self,
        samples: int,
        targets: Iterable[Target] = (Target.OUTPUT,),
        layers: Iterable[str] | Callable[[Layer], bool] | None = None,
        bits: tuple[int, ...] = (),
        kind: str = "flip",
        own_weights: bool = False,
    ) -> list[Stratum]:
        """A stratum per layer and target.

        samples: size of the data set. layers: names, or a function of a Layer; None: matrix products and convolutions.
        own_weights: a weight is wrong for one sample (linear layers), instead of for all. ValueError: a name the model
        does not have, or nothing that fits.
        """
        if layers is None:
            chosen = [layer for layer in self.layers if layer.kind in GEMMS]
        elif callable(layers):
            chosen = [layer for layer in self.layers if layers(layer)]
        else:
            chosen = [self.layer(name) for name in layers]
        found = []
        for layer in chosen:
            for target in targets:
                extent = layer.extents.get(target)
                if extent is not None:
                    whole = extent.shared and not (own_weights and extent.own)
                    sizes = extent.rows, extent.cols, extent.k
                    mine = None if whole else samples
                    found.append(Stratum(layer.name, target, extent.dtype, mine, *sizes, bits, kind))
        if not found:
            raise ValueError("rom.faults.Survey.strata: expected a layer that has one of the targets, got none.")
        return found

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(repr(layer.name) for layer in self.layers[:40])
        raise ValueError(f"rom.faults: expected a layer of {names}, got {name!r}.")

    def profile(self, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
        """(lowest, highest) result of every matrix product over batches of inputs (a tensor, or a tuple of them)."""
        bounds: dict[str, tuple[float, float]] = {}
        wanted = {layer.node: layer.name for layer in self.layers if layer.kind in GEMMS}
        for batch in batches:
            with torch.no_grad():
                seen = _run(self.graph, batch if isinstance(batch, tuple) else (batch,), set(wanted))
            for node, value in seen.items():
                low, high = bounds.get(wanted[node], (float("inf"), float("-inf")))
                bounds[wanted[node]] = min(low, value.min().item()), max(high, value.max().item())
        return bounds


def survey(model: nn.Module, *example: torch.Tensor) -> Survey:
    """Traces a model (`torch.export`) with an example batch and finds its layers. The model is not changed.

    example: its positional inputs, samples in the first dimension; any batch size, the graph serves all. The model is
    traced in its present mode (`eval()` or `train()`), and under the present autocast. Layers called several times are
    layers of their own, "fc" and "fc#2". Layers whose samples cannot be told apart are left out.

    ValueError: the model cannot be exported, or fixes its batch size.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(layer.name, layer.kind) for layer in rom.faults.survey(net, torch.randn(3, 4))]
    [('0', 'linear'), ('1', 'relu'), ('2', 'linear')]
    """
    if not example or not all(isinstance(x, torch.Tensor) and x.dim() for x in example):
        raise ValueError("rom.faults.survey: expected example inputs: tensors with samples in the first dimension.")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    batch = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in example)  # export fixes sizes of 1
    graph = _export(model, batch)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    size = inputs[0].meta["val"].shape[0]
    if not isinstance(size, torch.SymInt):
        raise ValueError(f"rom.faults.survey: the model works for batches of {size} only. Make its shapes depend on x.")
    nodes = [node for node in graph.graph.nodes if _offers(node)]
    finder = Finder(size.node.expr, graph, batch)
    layers: list[Layer] = []
    counts: dict[str, int] = {}
    for node in nodes:
        for layer in _layers_of(node, finder):
            counts[layer.name] = counts.get(layer.name, 0) + 1
            n = counts[layer.name]
            layers.append(layer if n == 1 else replace(layer, name=f"{layer.name}#{n}"))
    if not layers:
        raise ValueError("rom.faults.survey: no layer's result has the samples of a batch of any size.")
    return Survey(graph, tuple(layers))


def _export(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an encoder layer in one opaque operator has no layers
    try:
        dynamic = tuple({0: torch.export.Dim.AUTO} for _ in batch)
        traced = torch.export.export(model, batch, dynamic_shapes=dynamic, strict=False).module()
    except Exception as error:
        raise ValueError(
            f"rom.faults.survey: torch.export cannot trace this {type(model).__name__}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    graph = copied(traced.graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    return own_buffers(fx.GraphModule(traced, graph))


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy, with how it takes and returns its arguments."""
    with warnings.catch_warnings():  # torch 2.13 deprecates a class that its own graphs hold
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(graph)


def own_buffers(module: fx.GraphModule) -> fx.GraphModule:
    """Copies the buffers (the statistics of batch norm are the user's); parameters stay the same objects."""
    for name, buffer in list(module.named_buffers()):
        path, _, last = name.rpartition(".")
        module.get_submodule(path).register_buffer(last, buffer.detach().clone())
    return module


def _run(graph: fx.GraphModule, inputs: tuple[torch.Tensor, ...], wanted: set[str]) -> dict[str, torch.Tensor]:
    """The results of some nodes."""
    seen: dict[str, torch.Tensor] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted:
                seen[n.name] = value.detach()
            return value

    Interpreter(own_buffers(fx.GraphModule(graph, graph.graph))).run(*inputs)
    return seen


class Finder:
    """Finds the samples in the tensors of a graph."""

    def __init__(self, samples: Any, graph: fx.GraphModule, batch: tuple[torch.Tensor, ...]) -> None:
        self.samples, self.graph, self.batch = samples, graph, batch
        self.changes: dict[str, torch.Tensor] | None = None

    def place(self, node: Any) -> Place | None:
        """None: no samples, or they cannot be told apart."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            return None
        sizes: list[Any] = list(value.shape)  # int or torch.SymInt
        found = [(dim, n.node.expr / self.samples) for dim, n in enumerate(sizes) if isinstance(n, torch.SymInt)]
        if len(found) != 1 or not found[0][1].is_Integer:
            return None
        dim, parts = found[0][0], int(found[0][1])
        return Place(dim) if parts == 1 else self._merged(node.name, dim, parts)

    def _merged(self, name: str, dim: int, parts: int) -> Place | None:
        """Which elements of a flattened dimension change with sample 1?"""
        if self.changes is None:
            other = tuple(x.clone() for x in self.batch)
            for x in other:
                x[1] = torch.randn_like(x[1]) if x.is_floating_point() else x[0]
            names = {node.name for node in self.graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
            runs = []
            for inputs in (self.batch, other):
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    runs.append(_run(self.graph, inputs, names))
            self.changes = {n: runs[0][n] != runs[1][n] for n in names}
        change = self.changes[name].movedim(dim, 0).flatten(1).any(1)
        at, samples = change.nonzero()[:, 0], len(change) // parts
        outer, inner = bool((at // parts == 1).all()), bool((at % samples == 1).all())
        return None if outer == inner else Place(dim, parts, outer)


def _offers(node: fx.Node) -> bool:
    """A call that computes one floating tensor; a view of another is no layer."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.returns[0].alias_info is not None or str(value.dtype)[6:] not in DTYPES:
        return False
    return not (_kind(node) == "dropout" and node.args[2] is False)


def _kind(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def _name(node: fx.Node, kind: str, weight: Any = None) -> str:
    """The module's name; for several functions of one module, also the function's."""
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith("weight"):
        return str(weight.target).removesuffix("weight").rstrip("._") or kind
    stack = [entry for entry in (node.meta.get("nn_module_stack") or {}).values() if not entry[0].startswith("_empty")]
    path, owner = stack[-1] if stack else ("", "")
    owner = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
    single = owner.startswith("torch.nn.modules.") and not any(
        w in owner for w in ("transformer", "MultiheadAttention")
    )
    return path if single and path else f"{path}.{kind}".lstrip(".")


def _sizes(node: fx.Node, place: Place) -> list[int]:
    """Sizes of a tensor without its samples."""
    shape = node.meta["val"].shape
    sizes = [(place.parts if dim == place.dim else int(n)) for dim, n in enumerate(shape)]
    return sizes if place.parts > 1 else [n for dim, n in enumerate(sizes) if dim != place.dim]


def _layers_of(node: fx.Node, finder: Finder) -> list[Layer]:
    kind, args = _kind(node), node.args
    if kind == "scaled_dot_product_attention":
        return _attention(node, finder)
    weight = args[2] if kind == "addmm" else args[1] if len(args) > 1 else None
    dtype = node.meta["val"].dtype
    operand = args[1] if kind == "addmm" else args[0] if args else None
    place, result = finder.place(operand), finder.place(node)
    if result is None:
        return []
    name = _name(node, kind, weight if kind == "linear" or kind.startswith("conv") else None)
    extents, places = _value(node, result), (result,)
    if place is not None and isinstance(operand, fx.Node) and isinstance(weight, fx.Node):
        if kind in ("conv1d", "conv2d", "conv3d") and place == result == Place(0):
            extents = _convolution(node)
        elif kind in ("linear", "matmul", "mm", "addmm") and weight.meta["val"].dim() == 2:
            last = operand.meta["val"].dim() - 1
            one_bias = kind != "addmm" or (args[0].meta["val"].dim() == 1 and not node.kwargs)  # type: ignore[union-attr]
            if place == result and place.dim < last and finder.place(weight) is None and one_bias:
                bias = args[0] if kind == "addmm" else args[2] if kind == "linear" and len(args) > 2 else None
                extents, places = _shared_product(node, operand, place, bias is not None), (place,)
        elif kind in ("matmul", "bmm") and finder.place(weight) == place == result:
            extents, places = _batched_product(operand, weight, place, dtype), (place,)
    return [Layer(name, kind, node.name, places, extents, dtype)]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _value(node: fx.Node, place: Place) -> dict[Target, Extent]:
    sizes = _sizes(node, place)
    cols = sizes[-1] if sizes else 1
    rows = torch.Size(sizes[:-1]).numel()
    return {Target.OUTPUT: Extent(_text(node.meta["val"].dtype), rows, cols)} if rows * cols else {}


def _shared_product(node: fx.Node, operand: fx.Node, place: Place, bias: bool) -> dict[Target, Extent]:
    dtype = node.meta["val"].dtype
    *outer, k = _sizes(operand, place)
    return _product(dtype, 1, torch.Size(outer).numel(), int(node.meta["val"].shape[-1]), k, True, bias)


def _batched_product(a: fx.Node, b: fx.Node, place: Place, dtype: torch.dtype) -> dict[Target, Extent]:
    *outer, rows, k = _sizes(a, place)
    if _sizes(b, place)[:-2] != outer or place.dim >= a.meta["val"].dim() - 2:
        return {}
    return _product(dtype, torch.Size(outer).numel(), rows, int(b.meta["val"].shape[-1]), k, False, False)


def _product(
    dtype: torch.dtype, heads: int, rows: int, cols: int, k: int, shared: bool, bias: bool
) -> dict[Target, Extent]:
    name, wide = _text(dtype), _ACCUMULATOR.get(dtype, "float32")
    extents = {
        Target.A: Extent(name, heads * rows, cols, k),
        Target.B: Extent(name, heads, cols, k, shared),
        Target.ACCUMULATOR: Extent(wide, heads * rows, cols, k),
        Target.BEFORE_CAST: Extent(wide, heads * rows, cols, k),
        Target.OUTPUT: Extent(name, heads * rows, cols, k),
    }
    return extents | ({Target.BIAS: Extent(name, 1, cols, 1, True, False)} if bias else {})


def _convolution(node: fx.Node) -> dict[Target, Extent]:
    x, weight, out = (n.meta["val"] for n in (node.args[0], node.args[1], node))  # type: ignore[union-attr]
    dtype, cols = _text(out.dtype), int(out.shape[1])
    rows = torch.Size(int(n) for n in out.shape[2:]).numel()
    pixels = torch.Size(int(n) for n in x.shape[2:]).numel()
    extents = {
        Target.A: Extent(dtype, pixels, 1, int(x.shape[1])),
        Target.B: Extent(dtype, 1, cols, weight[0].numel(), True, False),
        Target.OUTPUT: Extent(dtype, rows, cols),
    }
    bias = len(node.args) > 2 and node.args[2] is not None
    return extents | ({Target.BIAS: Extent(dtype, 1, cols, 1, True, False)} if bias else {})


def _attention(node: fx.Node, finder: Finder) -> list[Layer]:
    """Scores = Q Kᵀ and values = P V; with dropout or grouped heads, its result only."""
    q, k, v = node.args[:3]
    places = [finder.place(x) for x in (q, k, v, node)]
    name, dtype = _name(node, "attention"), node.meta["val"].dtype
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:])) | node.kwargs
    plain = not options.get("dropout_p") and not options.get("enable_gqa") and options.get("attn_mask") is None
    if places[3] is None:
        return []
    if places != [Place(0)] * 4 or not plain:
        return [Layer(name, "attention", node.name, (places[3],), _value(node, places[3]), dtype)]
    *heads, rows, width = _sizes(q, Place(0))  # type: ignore[arg-type]
    length, out = (int(n) for n in v.meta["val"].shape[-2:])  # type: ignore[union-attr]
    outer = torch.Size(heads).numel()
    layers = (("scores", length, width), ("values", out, length))
    return [
        Layer(
            f"{name}.{part}",
            "attention",
            node.name,
            (Place(0),),
            _product(dtype, outer, rows, cols, inner, False, False),
            dtype,
        )
        for part, cols, inner in layers
    ]
