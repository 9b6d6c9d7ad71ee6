"""Pieces of a model: only what a fault can still change is computed, everything else is read from the golden run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from rom.faults.inject import Attention, Restrict
from rom.faults.layers import GEMMS, Finder, Place, Survey, copied, own_buffers

Free = Mapping[str, Mapping[int, str]]  # by node: arguments that become inputs of a program, and their names


class Program(NamedTuple):
    """A function from its own inputs (in order), then the golden values of `reads`, to a tuple of results."""

    run: Callable[..., Any]
    reads: tuple[str, ...]


class Pieces:
    """A model's graph, and programs that compute parts of it.

    constants: the values of nodes that no sample reaches (and of sizes: a batch always has the same number of rows).
    places: where the samples are in the values that can be kept.
    """

    def __init__(self, graph: fx.GraphModule, places: Mapping[str, Place], constants: Mapping[str, Any]) -> None:
        self.graph, self.places, self.constants = graph, places, constants
        self.order = list(graph.graph.nodes)
        self.nodes = {node.name: node for node in self.order}
        result = next(node for node in self.order if node.op == "output").args[0]
        while isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
        if not isinstance(result, fx.Node):
            raise ValueError("rom.campaign.Engine: expected a model with one tensor as its result, logits [N, C].")
        self.end = result.name

    def value(self, node: fx.Node) -> Any:
        """Of a parameter, a buffer or a constant."""
        if node.op != "get_attr":
            return self.constants[node.name]
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.graph.get_submodule(owner), name)

    def behind(self, start: str) -> set[str]:
        """The node and all that depend on it."""
        found = {start}
        for node in self.order:
            if any(source.name in found for source in node.all_input_nodes):
                found.add(node.name)
        return found

    def before(self, end: str) -> set[str]:
        """The node and all it depends on."""
        found, todo = set(), [self.nodes[end]]
        while todo:
            node = todo.pop()
            if node.name not in found:
                found.add(node.name)
                todo += node.all_input_nodes
        return found

    def program(
        self,
        end: str | tuple[str, ...],
        given: Iterable[str] = (),
        dirty: Iterable[str] = (),
        free: Free | None = None,
    ) -> Program:
        """Computes `end`.

        Its own inputs are the nodes `given`, then the arguments named in `free`. Nodes in `dirty` are computed; others
        are read where they are kept, and computed where they are not (views of what is kept, for one).
        """
        free, given, dirty = free or {}, tuple(given), set(dirty)
        ends = (end,) if isinstance(end, str) else end
        reads, body, todo = [], set(), [self.nodes[name] for name in ends]
        while todo:
            node = todo.pop()
            if node.name in given or node.name in body or node.name in reads or node.name in self.constants:
                continue
            if node.op == "get_attr":
                continue
            if node.name not in dirty and node.name in self.places:
                reads.append(node.name)
                continue
            body.add(node.name)
            unfixed = free.get(node.name, {})
            todo += [a for i, a in enumerate(node.args) if i not in unfixed for a in _nodes(a)]
            todo += [a for value in node.kwargs.values() for a in _nodes(value)]
        reads = [node.name for node in self.order if node.name in reads]
        return Program(self._compiled(ends, (*given, *reads), body, free, given), tuple(reads))

    def _compiled(
        self, ends: tuple[str, ...], inputs: tuple[str, ...], body: set[str], free: Free, given: tuple[str, ...]
    ) -> Callable[..., Any]:
        graph = fx.Graph()
        root: dict[str, Any] = {}
        known: dict[str, Any] = {name: graph.placeholder(name) for name in given}
        fresh = {name: graph.placeholder(name) for unfixed in free.values() for name in unfixed.values()}
        known |= {name: graph.placeholder(name) for name in inputs[len(given) :]}

        def value(node: fx.Node) -> Any:
            if node.name not in known:
                constant = self.value(node)
                if isinstance(constant, torch.Tensor):
                    root[f"constant_{node.name}"] = constant
                    constant = graph.get_attr(f"constant_{node.name}")
                known[node.name] = constant
            return known[node.name]

        for node in self.order:
            if node.name not in body:
                continue
            if node.op == "call_module":
                root[str(node.target)] = self.graph.get_submodule(str(node.target))
            unfixed = free.get(node.name, {})
            args = [fresh[unfixed[i]] if i in unfixed else fx.node.map_arg(a, value) for i, a in enumerate(node.args)]
            kwargs = fx.node.map_arg(node.kwargs, value)
            known[node.name] = graph.create_node(node.op, node.target, tuple(args), dict(kwargs), name=node.name)
        graph.output(tuple(value(self.nodes[name]) for name in ends))
        return fx.GraphModule(root, graph).forward  # a plain function: no interpreter, no hooks

    def dominators(self, start: str) -> Iterator[tuple[str, int]]:
        """Values behind `start` through which all its effects go, in order, and how many heavy nodes lie before."""
        dirty, reached = self.behind(start), self.before(self.end)
        live, heavy = {start}, 0
        pending = {n.name: sum(u.name in reached for u in n.users) for n in self.order if n.name in dirty}
        for node in self.order:
            if node.name == start or node.name not in dirty or node.name not in reached:
                continue
            heavy += _heavy(node)
            for source in node.all_input_nodes:
                if source.name in live:
                    pending[source.name] -= 1
                    if not pending[source.name]:
                        live.discard(source.name)
            live.add(node.name)
            if live == {node.name} and node.name in self.places:
                yield node.name, heavy

    def cut(self, start: str) -> str:
        """Where rows equal to the golden ones are dropped: the last value before the next heavy node through which all
        effects of `start` go; `start` itself if there is no other."""
        found = start
        for name, heavy in self.dominators(start):
            if heavy:
                break
            found = name
        return found

    def next_cuts(self, cut: str) -> list[str]:
        """Possible cuts behind the next heavy nodes and before those after them, the last one first."""
        behind = [(name, heavy) for name, heavy in self.dominators(cut) if heavy]
        return [name for name, heavy in reversed(behind) if heavy == behind[0][1]]


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def kind_of(node: fx.Node) -> str:
    """The function a node calls: "linear", "relu", …; "" for others."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[1]


def _heavy(node: fx.Node) -> bool:
    return kind_of(node) in (*GEMMS, "scaled_dot_product_attention") or (
        node.op == "call_module" and not str(node.target).startswith("bounds")
    )


# ------------------------------------------------------------------------------------------------ preparation
def prepared(found: Survey, bounds: Mapping[str, tuple[float, float]], nan_to: str, layers: set[str]) -> fx.GraphModule:
    """The surveyed graph with range restriction in it, without in-place operations, and with attention written out
    where the plan names its products: a fault there must be compared with products computed alike."""
    graph = own_buffers(fx.GraphModule(found.graph, copied(found.graph.graph)))
    nodes = {node.name: node for node in graph.graph.nodes}
    for node in list(graph.graph.nodes):
        _out_of_place(node)
    replaced = {layer.node for layer in found if layer.name in layers and layer.name.split("#")[0].endswith(PARTS)}
    for number, name in enumerate(sorted(replaced)):
        if kind_of(nodes[name]) != "scaled_dot_product_attention":
            continue
        graph.add_submodule(f"attention_{number}", Attention(None, None))
        node = nodes[name]
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(f"attention_{number}", node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        new.name = name
    for number, (name, pair) in enumerate(bounds.items()):
        node = next(n for n in graph.graph.nodes if n.name == found.layer(name).node)
        graph.add_submodule(f"bounds_{number}", Restrict(pair, nan_to))
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(f"bounds_{number}", (node,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    graph.recompile()
    return graph


PARTS = (".scores", ".values")


def _out_of_place(node: fx.Node) -> None:
    """relu_ becomes relu: a value that is kept must not change afterwards."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    name, changed = kind_of(node), node.args[0]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overload = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]
    view = isinstance(changed, fx.Node) and _is_view(changed)
    if not name.endswith("_") or overload is None or overload._schema.is_mutable or view:
        raise ValueError(
            f"rom.campaign.Engine: the model changes {'a view of ' if view else ''}a tensor in place ({node.target}). "
            "Write it out of place, and call model.eval() before."
        )
    node.target = overload
    assert isinstance(changed, fx.Node)
    later = {user for user in changed.users if user > node}
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def keepable(graph: fx.GraphModule, finder: Finder) -> dict[str, Place]:
    """Values with samples that are worth keeping: no views, and their samples can be told apart."""
    found: dict[str, Place] = {}
    for node in graph.graph.nodes:
        tuple_part = node.target is operator.getitem and not _is_view(node.args[0])
        computed = node.op in ("placeholder", "call_module") or kind_of(node) or tuple_part
        if (
            node.op == "call_module" and node.all_input_nodes[0].name in found
        ):  # restricted: placed like the value itself
            found[node.name] = found[node.all_input_nodes[0].name]
        elif computed and not _is_view(node) and isinstance(node.meta.get("val"), torch.Tensor):
            place = finder.place(node)
            if place is not None:
                found[node.name] = place
    return found


def observed(graph: fx.GraphModule, batch: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values no sample reaches, for batches of this size; and of every tensor its shape, strides and dtype (on the
    meta device)."""
    reached: set[fx.Node] = set()
    for node in graph.graph.nodes:
        tensor = not isinstance(node.meta.get("val"), (torch.SymInt, int))
        if node.op == "placeholder" or (tensor and any(source in reached for source in node.all_input_nodes)):
            reached.add(node)
    fixed: dict[str, Any] = {}
    shapes: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n not in reached and n.op not in ("get_attr", "output"):
                fixed[n.name] = value
            if isinstance(value, torch.Tensor):
                shapes[n.name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return value

    Recorder(graph).run(batch)
    return fixed, shapes
