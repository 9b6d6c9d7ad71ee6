"""`Engine`: runs the faults of a plan, doing only the work that their effects need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rom.campaign.cone import ROWS
from rom.campaign.golden import Batch, Kept, Layout
from rom.campaign.lanes import WIDE, Lane, MemoryLane, ModuleLane, PatchedLane, ValueLane, strided
from rom.campaign.outcomes import Golden, Tally, bits
from rom.campaign.restart import Pieces, Program, keepable, observed, prepared
from rom.campaign.waves import Chain, Queue, Wave
from rom.faults import records
from rom.faults.inject import check_plan
from rom.faults.layers import Finder, Layer, Place, Survey, survey
from rom.faults.plan import FaultPlan
from rom.faults.population import Stratum
from rom.faults.records import Target


class Work(NamedTuple):
    """Some faults with their sites: fault i has sites starts[i] to starts[i + 1]."""

    sites: np.ndarray
    strata: np.ndarray  # of each site
    starts: np.ndarray
    sample: np.ndarray  # of each fault; −1: several, or all

    def of(self, fault: int) -> slice:
        """The sites of a fault."""
        return slice(int(self.starts[fault]), int(self.starts[fault + 1]))


class Crowd(NamedTuple):
    """Faults that go the same way: of a lane, and with a chain through windows first."""

    lane: Lane
    chain: Chain | None
    faults: np.ndarray


class Engine:
    """The faults of a plan in a model, on an evaluation set.

    The golden run is done at once. Faults then begin again at the layer they hit, with many of them in one batch, and
    end where the golden values are back.

    Args:
        found: the `rom.faults.survey` of a model, or a model that can be surveyed; in `eval()` mode.
        plan: strata of this model; its samples are rows of `inputs`.
        inputs: `[N, ...]`, the evaluation set. labels: int64 `[N]`.
        batch_size: rows of every pass. Results do not depend on how faults are cut into calls; another batch size is
            another arithmetic where the library sums in another order, as with another number of threads.
        restart: False runs the whole model for every fault. cone: recompute only the windows of convolutions that a
            fault reaches, which changes no bit. Nor does restart, except by rounding where the faulty operators of
            `rom.inject`, which full runs use everywhere, round otherwise than the model's (bfloat16 and float64
            products over transposed memory).
        bounds: (low, high) by layer, from `Survey.profile`; the golden run has them too. nan_to: what NaN becomes.
        mode: of `rom.ops.faulty_matmul`.
        device: where it runs; None: where the inputs are.
        memory: bytes for the golden values at which faults begin. With less than the whole set needs, samples are run
            again group by group in every call.

    ValueError: the plan is not of this model, samples and labels do not fit, the model's result is not `[N, C]`, or two
    runs of it differ (training mode).

    >>> from rom import faults
    >>> net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(6, 4)
    >>> found = faults.survey(net.eval(), x)
    >>> plan = faults.FaultPlan.simple(found.strata(samples=6), n=100, seed=0)
    >>> engine = rom.campaign.Engine(found, plan, x, torch.zeros(6, dtype=torch.int64), batch_size=4)
    >>> result = engine.run(np.arange(100))
    >>> int(result["cells"].sum()), engine.golden.logits.shape
    (100, torch.Size([6, 3]))
    """

    def __init__(
        self,
        found: Survey | nn.Module,
        plan: FaultPlan,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        batch_size: int = 32,
        restart: bool = True,
        cone: bool = True,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        nan_to: str = "max",
        mode: str = "exact",
        device: torch.device | str | None = None,
        memory: int = 2 << 30,
    ) -> None:
        _check_data(inputs, labels, batch_size)
        found = found if isinstance(found, Survey) else survey(found, inputs[:2])
        check_plan(found, plan)
        for stratum in plan.strata:
            if stratum.samples is not None and stratum.samples > len(inputs):
                raise ValueError(
                    f"rom.campaign.Engine: the plan names {stratum.samples} samples (layer {stratum.layer!r}), "
                    f"inputs has {len(inputs)}."
                )
        self.plan, self.found, self.batch_size, self.restart = plan, found, batch_size, restart
        self.device = torch.device(device) if device is not None else inputs.device
        self.inputs = inputs.to(self.device)
        self._options = {"mode": mode, "grad": "clean", "persistence": "transient"}
        with torch.no_grad():
            self._prepare(labels, bounds or {}, nan_to, memory, cone)

    def _prepare(
        self, labels: torch.Tensor, bounds: Mapping[str, tuple[float, float]], nan_to: str, memory: int, cone: bool
    ) -> None:
        found = self.found
        graph = prepared(found, bounds, nan_to, {s.layer for s in self.plan.strata}).to(self.device)
        sources = [node for node in graph.graph.nodes if node.op == "placeholder"]
        if len(sources) != 1:
            raise ValueError(f"rom.campaign.Engine: expected a model of one input tensor, got one of {len(sources)}.")
        first = self.inputs.index_select(
            0, torch.arange(self.batch_size).clamp(max=len(self.inputs) - 1).to(self.device)
        )
        self._finder = Finder(sources[0].meta["val"].shape[0].node.expr, found.graph, (first[:2].cpu(),))
        fixed, self._shapes = observed(graph, first)
        self._places = keepable(graph, self._finder) if self.restart else {sources[0].name: Place(0)}
        self._pieces = pieces = Pieces(graph, self._places, fixed)
        self._whole = Pieces(graph, {sources[0].name: Place(0)}, fixed)
        end = self._pieces.nodes[self._pieces.end]
        if not self._keep(end.name) or self._places[end.name] != Place(0) or end.meta["val"].dim() != 2:
            got = getattr(end.meta.get("val"), "shape", type(end.meta.get("val")).__name__)
            raise ValueError(
                f"rom.campaign.Engine: expected a model with one tensor as its result, logits [N, C], got {got}."
            )
        self._lanes: dict[Any, Lane] = {}
        self._tails: dict[str, Program] = {}
        self._moves: dict[Any, bool] = {}
        self._layers = np.array([s.layer for s in self.plan.strata], object)
        strata = self.plan.strata
        for layer in (found.layer(stratum.layer) for stratum in strata if self.restart):
            self._keep(layer.node)
            if gemm := arguments_of(layer):  # often a view: kept all the same
                self._keep(pieces.nodes[layer.node].args[gemm[0]].name)
        self._own, self._shared = ([self._lane_of(s, shared) for s in strata] for shared in (False, True))
        self._chains: dict[Lane, Chain] = {}
        names = [end.name]
        for lane in self._lanes.values() if cone else ():
            if isinstance(lane, ValueLane) and lane.result and len(self._shapes[lane.name].shape) == 4:
                chain = Chain(pieces, self._shapes, lane)
                for segment in chain.segments:
                    names += [*segment.needs, *self._tail(segment.end).reads]
                self._chains[lane] = chain
        for lane in self._lanes.values():
            names += [lane.cut, *lane.head.reads, *self._tail(lane.cut).reads]
            names += [lane.name] if isinstance(lane, ValueLane) else []
        self._kept = Kept(self._pieces, self._shapes, self.inputs, names, self.batch_size, memory)
        self.golden = Golden(self._kept.everything(), labels)
        present = np.flatnonzero(self._kept.slot >= 0)[:ROWS]
        trial = self._kept.batch_of(present, np.arange(len(present)), ROWS)
        for chain in self._chains.values():
            chain.rehearse(self._kept, trial)
        self._chains = {
            lane: chain for lane, chain in self._chains.items() if chain.segments and self._try_tail(chain.end)
        }

    # ------------------------------------------------------------------------------------------------ lanes
    def _keep(self, name: str) -> bool:
        """Whether a value can be kept; a view can where it must."""
        if name not in self._places and name in self._shapes:
            place = self._finder.place(self._pieces.nodes[name])
            if place is not None:
                self._places[name] = place
        return name in self._places

    def _lane_of(self, stratum: Stratum, shared: bool) -> Lane | None:
        """The lane of a stratum's faults of one sample, or of all; None where the plan cannot have them."""
        layer, target = self.found.layer(stratum.layer), stratum.target
        if not shared and stratum.samples is None and self.plan.scheme != "file":
            return None
        if shared and stratum.samples is not None and self.plan.scheme != "file":
            return None
        key = layer.name, target, shared
        if key not in self._lanes:
            lane = (self._memory_lane if shared else self._value_lane)(layer, target) if self.restart else None
            self._lanes[key] = lane or self._module_lane((layer.name,))
        return self._lanes[key]

    def _value_lane(self, layer: Layer, target: Target) -> Lane | None:
        gemm = arguments_of(layer)
        result = target == Target.OUTPUT or (target == Target.BEFORE_CAST and layer.dtype in WIDE)
        name, argument = layer.node, None
        if target == Target.A and gemm is not None:
            argument = gemm[0]
            operand = self._pieces.nodes[layer.node].args[argument]
            name = operand.name
        if not (result or argument is not None) or (layer.kind == "attention" and Target.A in layer.extents):
            return None
        if not self._keep(name):
            return None
        layout = Layout(self._shapes[name], self._places[name])
        if not strided(layer, layout):
            return None
        return ValueLane(self._pieces, layer, target, name, layout, argument)

    def _memory_lane(self, layer: Layer, target: Target) -> Lane | None:
        gemm = arguments_of(layer)
        if gemm is None or target not in (Target.B, Target.BIAS):
            return None
        argument = gemm[1 if target == Target.B else 2]
        node = self._pieces.nodes[layer.node].args[argument]
        memory = self._pieces.value(node)
        if layer.kind.startswith("conv") and not memory.is_contiguous():
            return None
        return MemoryLane(self._pieces, layer, target, argument, memory)

    def _module_lane(self, names: tuple[str, ...]) -> ModuleLane:
        key = tuple(sorted(names))
        if key not in self._lanes:
            whole = len(names) > 1 or not self.restart
            pieces = self._whole if whole else self._pieces
            self._lanes[key] = ModuleLane(pieces, self.found, self.plan, names, self._options, whole)
        lane = self._lanes[key]
        assert isinstance(lane, ModuleLane)
        return lane

    def _tail(self, cut: str) -> Program:
        """The model behind a cut."""
        if cut not in self._tails:
            self._tails[cut] = self._pieces.program(self._pieces.end, (cut,), self._pieces.behind(cut))
        return self._tails[cut]

    # ------------------------------------------------------------------------------------------------ running
    def run(self, positions: Any) -> np.ndarray:
        """The faults at these positions of the plan: records of dtype `rom.campaign.RESULT`, in this order.

        Give it many at a time: a layer's faults share batches, and the last batch of a layer is filled up with rows
        that are thrown away.
        """
        positions = np.asarray(positions, np.int64).reshape(-1)
        work = self._unfold(positions)
        tally = Tally(positions, self.golden)
        results = tally.results
        first = work.starts[:-1]
        empty = np.diff(work.starts) == 0
        results["stratum"][empty] = -1
        results["stratum"][~empty] = work.strata[first[~empty]]
        results["sample"] = work.sample
        results["cells"] = np.where(work.sample < 0, len(self.inputs), 1)
        lanes = self._sorted(work)
        shared = (work.sample < 0).any()
        samples = np.arange(len(self.inputs)) if shared else np.unique(work.sample)
        with torch.no_grad():
            for present in self._kept.groups(samples):
                for cut, crowds in lanes.items():
                    queue = self._queue(cut, tally)
                    for lane, chain, faults in crowds:
                        single = faults[work.sample[faults] >= 0]
                        single = single[present[work.sample[single]]]
                        if chain is None:
                            self._run_own(lane, work, single, queue)
                        else:
                            self._run_windows(chain, work, single, queue)
                        for fault in faults[work.sample[faults] < 0]:
                            self._run_shared(lane, work, int(fault), np.flatnonzero(present), queue)
                    queue.flush()
        results["masked"][empty] = results["cells"][empty]
        return tally.done()

    def _unfold(self, positions: np.ndarray) -> Work:
        strata, sites = self.plan.take(positions)
        counts = np.ones(len(positions), np.int64)
        if self.plan.records is not None:
            ids = self.plan.records.sites["fault_id"]
            counts = np.searchsorted(ids, positions, side="right") - np.searchsorted(ids, positions, side="left")
        owner = np.repeat(np.arange(len(positions)), counts)
        samples = sites["sample"].astype(np.int64)
        samples[samples == records.ALL] = -1
        low, high = np.full(len(positions), len(self.inputs)), np.full(len(positions), -1)
        np.minimum.at(low, owner, samples)
        np.maximum.at(high, owner, samples)
        return Work(sites, strata, np.append(0, np.cumsum(counts)), np.where(low == high, low, -1))

    def _sorted(self, work: Work) -> dict[str, list[Crowd]]:
        """The faults by the cut behind which whole values go on."""
        lanes = list(dict.fromkeys(lane for lane in (*self._own, *self._shared) if lane is not None))
        number = {lane: i for i, lane in enumerate(lanes)} | {None: -1}
        own, shared = (np.array([number[lane] for lane in table]) for table in (self._own, self._shared))
        of_site = np.where(work.sites["sample"] == records.ALL, shared[work.strata], own[work.strata])
        found = np.full(len(work.sample), -1)
        for fault in range(len(found)) if self.plan.records is not None else ():
            mine = of_site[work.of(fault)]
            if len(mine) and (mine == mine[0]).all():
                found[fault] = mine[0]
            elif len(mine):
                names = {self.plan.strata[h].layer for h in work.strata[work.of(fault)]}
                several: Lane = self._module_lane(tuple(sorted(names)))
                lanes += [] if several in lanes else [several]
                found[fault] = lanes.index(several)
        if self.plan.records is None:
            found = of_site
        groups: dict[str, list[Crowd]] = {}
        single = np.diff(work.starts) == 1
        for i, lane in enumerate(lanes):
            chain = self._chains.get(lane)
            windows = (found == i) & single & (work.sample >= 0) & (chain is not None)
            if chain is not None and windows.any():
                groups.setdefault(chain.end, []).append(Crowd(lane, chain, np.flatnonzero(windows)))
            if ((found == i) & ~windows).any():
                groups.setdefault(lane.cut, []).append(Crowd(lane, None, np.flatnonzero((found == i) & ~windows)))
        return groups

    def _run_own(self, lane: Lane, work: Work, faults: np.ndarray, queue: Queue) -> None:
        """Faults of one sample each: many in a batch, fault j in a row of its own."""
        for chosen, rows in self._batches(work.sample[faults], self._rehearsed(lane)):
            mine = faults[chosen]
            batch = self._kept.batch_of(work.sample[mine], rows)
            counts = work.starts[mine + 1] - work.starts[mine]
            first = np.cumsum(counts) - counts
            at = np.arange(counts.sum()) + np.repeat(work.starts[mine] - first, counts)
            sites = work.sites[at]
            sites["sample"] = np.repeat(rows, counts)
            value, log = self._head(lane, sites, work.strata[at], batch)
            for name in ("old", "new"):
                queue.tally.results[name][mine] = log[name][first]
            queue.push(value, rows, batch, mine, self._clean(lane, batch))

    def _run_windows(self, chain: Chain, work: Work, faults: np.ndarray, queue: Queue) -> None:
        """Faults of one pixel each, through the cone."""
        wave = Wave(chain, self._kept, queue.tally, queue.add, self.batch_size)
        for i in range(0, len(faults), ROWS):
            mine = faults[i : i + ROWS]
            log = wave.start(work.sites[work.starts[mine]], work.sample[mine], mine)
            for name in ("old", "new"):
                queue.tally.results[name][mine] = log[name]
        wave.flush()

    def _batches(self, samples: np.ndarray, move: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(which of them, their rows) of every batch. Where a row's bits depend on its place in the batch, a sample has
        the row it had in the golden run."""
        size, everything = self.batch_size, np.arange(len(samples))
        if move:
            for i in range(0, len(samples), size):
                yield everything[i : i + size], everything[: len(samples[i : i + size])]
            return
        rows = samples % size
        order = np.argsort(rows, kind="stable")
        turn = np.empty_like(rows)
        turn[order] = everything - np.searchsorted(rows[order], rows[order])
        for i in range(turn.max() + 1 if len(turn) else 0):
            yield np.flatnonzero(turn == i), rows[turn == i]

    def _run_shared(self, lane: Lane, work: Work, fault: int, samples: np.ndarray, queue: Queue) -> None:
        """A fault that several samples meet: over all of them, in the batches of the golden run."""
        self._rehearsed(lane)
        sites, strata = work.sites[work.of(fault)], work.strata[work.of(fault)]
        named = sites["sample"].astype(np.int64)
        everywhere = named == records.ALL
        result = queue.tally.results[fault : fault + 1]
        memory = None
        if isinstance(lane, MemoryLane):
            memory = lane.fresh(self._kept)
            log = lane.patch(memory, sites)
            result["old"], result["new"] = log["old"][0], log["new"][0]
        for chunk in np.unique(samples // self.batch_size):
            mine = samples[samples // self.batch_size == chunk]
            faults = np.full(len(mine), fault)
            if not everywhere.any() and not (named // self.batch_size == chunk).any():
                queue.tally.masked(faults)
                continue
            batch = self._kept.batch_of(mine, np.arange(len(mine)))
            if memory is not None:
                value = self._run(lane.head, (memory,), batch)
            else:
                here = sites.copy()
                inside = ~everywhere & (named // self.batch_size == chunk)
                here["sample"] = np.where(inside, named % self.batch_size, records.NOWHERE)
                here["sample"][everywhere] = records.ALL
                value, log = self._head(lane, here, strata, batch)
                if log["status"][0] == records.APPLIED and (not everywhere[0] or chunk == 0):
                    result["old"], result["new"] = log["old"][0], log["new"][0]
            queue.push(value, np.arange(len(mine)), batch, faults, self._clean(lane, batch))

    def _head(self, lane: Lane, sites: np.ndarray, strata: np.ndarray, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """The value at the cut of a batch with these sites, and their log."""
        if isinstance(lane, PatchedLane):
            own = lane.fresh(self._kept, batch)
            log = lane.patch(own, sites)
            return self._run(lane.head, (own,), batch), log
        assert isinstance(lane, ModuleLane)
        names = self._layers[strata]
        lane.arm(sites, names)
        return self._run(lane.head, (), batch), lane.log(names)

    def _run(self, program: Program, own: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
        return program.run(*own, *(self._kept.rows(name, batch) for name in program.reads))[0]

    def _clean(self, lane: Lane, batch: Batch) -> torch.Tensor:
        """What rows at the cut are compared with: the golden values."""
        if lane.twice:
            assert isinstance(lane, ModuleLane)
            lane.arm(np.zeros(0, records.SITE), np.zeros(0, object))
            return self._kept.layouts[lane.cut].samples_first(self._run(lane.head, (), batch))
        return self._kept.plain_rows(lane.cut, batch)

    # ------------------------------------------------------------------------------------------------ rehearsal
    def _rehearsed(self, lane: Lane) -> bool:
        """Whether rows may stand anywhere in a batch on the way from this lane to the result: tried once, with golden
        values in reverse order, which must give the golden bits."""
        if lane not in self._moves:
            self._moves[lane] = self._try_lane(lane) and self._try_tail(lane.cut)
        return self._moves[lane]

    def _trials(self) -> Iterator[tuple[bool, Batch, torch.Tensor]]:
        """Golden samples in reverse order, then in their own rows, with other companions: (whether they moved, the
        batch, which rows must have the golden bits)."""
        first = np.flatnonzero(self._kept.slot >= 0)[0]
        rows = np.arange(self.batch_size)
        samples = np.minimum(first + rows, len(self.inputs) - 1)
        yield True, self._kept.batch_of(samples, rows[::-1]), torch.from_numpy(rows)
        rows = rows[: len(self.inputs) - first]  # no sample has a golden row behind these
        samples = first + rows
        samples[1::2] = first
        yield False, self._kept.batch_of(samples, rows), torch.from_numpy(rows[::2])

    def _try(self, run: Callable[[Batch], torch.Tensor], cut: str) -> bool | None:
        """Whether rows may move; None: not even rows that stay have the golden bits."""
        for moved, batch, rows in self._trials():
            value = self._kept.layouts[cut].samples_first(run(batch))
            if torch.equal(bits(value)[rows], bits(self._kept.plain_rows(cut, batch))[rows]):
                return moved
        return None

    def _try_lane(self, lane: Lane) -> bool:
        nothing = np.zeros(0, records.SITE), np.zeros(0, np.int32)
        moves = self._try(lambda batch: self._head(lane, *nothing, batch)[0], lane.cut)
        if moves is None and isinstance(lane, PatchedLane):
            raise ValueError(NOT_REPRODUCIBLE)
        lane.twice = moves is None
        return bool(moves)

    def _try_tail(self, cut: str) -> bool:
        if cut not in self._moves:
            moves = self._try(lambda batch: self.tail(cut, self._kept.rows(cut, batch), batch), self._pieces.end)
            if moves is None:
                raise ValueError(NOT_REPRODUCIBLE)
            self._moves[cut] = moves
        return self._moves[cut]

    def _queue(self, cut: str, tally: Tally) -> Queue:
        tail = None if cut == self._pieces.end else partial(self.tail, cut)
        return Queue(self._kept, cut, tally, tail, self._try_tail(cut))

    def tail(self, cut: str, value: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The result of a batch with this value at a cut."""
        return self._run(self._tail(cut), (value,), batch)


NOT_REPRODUCIBLE = (
    "rom.campaign.Engine: two runs of the model on the same samples differ. Call model.eval() before the survey: "
    "batch norm in training mode mixes samples, dropout draws new numbers."
)


def arguments_of(layer: Layer) -> tuple[int, int, int] | None:
    """Where a product's operand, weight and bias are among its arguments; None: both operands have samples."""
    if Target.B not in layer.extents or not layer.extents[Target.B].shared:
        return None
    return (1, 2, 0) if layer.kind == "addmm" else (0, 1, 2)


def _check_data(inputs: Any, labels: Any, batch_size: int) -> None:
    if not isinstance(inputs, torch.Tensor) or inputs.dim() < 1 or not len(inputs):
        got = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ValueError(f"rom.campaign.Engine: expected inputs, a tensor [N, ...] of at least one sample, got {got}.")
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"rom.campaign.Engine: expected labels of int64 {tuple(inputs.shape[:1])}, got {got}.")
    if batch_size < 1:
        raise ValueError(f"rom.campaign.Engine: expected a batch_size of at least 1, got {batch_size}.")
