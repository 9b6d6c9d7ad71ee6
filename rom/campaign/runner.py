"""`run`: a campaign from its plan to a complete store, interrupted and resumed as often as it takes."""

from __future__ import annotations

import hashlib
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

import rom
from rom.campaign import statistics
from rom.campaign.engine import Engine
from rom.campaign.errors import CampaignError
from rom.campaign.progress import Progress
from rom.campaign.store import Store
from rom.faults import FaultPlan, Survey, model_fingerprint
from rom.interrupts import Interrupts

Done = tuple[int, np.ndarray, float]  # a block, its results and the seconds they took


@dataclass(frozen=True)
class Stop:
    """Stops a campaign as soon as the rate of silent corruptions (sdc + critical) is known to ± `margin`.

    That is asked only after `first`, 2 `first`, 4 `first`, … faults (each rounded up to whole blocks), and every one of
    these K looks has the level 1 − (1 − level) / K, so that the interval at which the campaign stops holds with
    probability `level` although it was chosen by looking (`statistics.Schedule`).
    """

    margin: float
    first: int = 1024
    level: float = 0.95

    def schedule(self, plan: FaultPlan, block_size: int) -> statistics.Schedule:
        """The looks, at the ends of blocks."""
        first = -(-self.first // block_size) * block_size
        return statistics.Schedule.doubling(min(first, len(plan)), len(plan), self.level)


@dataclass(frozen=True)
class Summary:
    """How a call of `run` ended: the faults that are done, of those there are (in the shard, if it was one)."""

    state: Literal["complete", "stopped", "interrupted"]
    done: int
    faults: int
    store: Path


class Executor(Protocol):
    """Who runs blocks: this process, or workers elsewhere."""

    golden: dict[str, Any]  # as `describe` gives it

    def run(self, blocks: Iterable[tuple[int, np.ndarray]], halted: Callable[[], bool]) -> Iterator[Done]:
        """Runs blocks (number, positions), in any order; begins no more once `halted`."""

    def close(self) -> None:
        """Lets go of what it holds."""


class Local:
    """This process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.golden = engine, describe(engine)

    def run(self, blocks: Iterable[tuple[int, np.ndarray]], halted: Callable[[], bool]) -> Iterator[Done]:
        """One block after the other."""
        for block, positions in blocks:
            if halted():
                return
            started = time.perf_counter()
            results = self.engine.run(positions)
            yield block, results, time.perf_counter() - started

    def close(self) -> None:
        """Nothing to let go of."""


def run(
    model: nn.Module | Survey,
    plan: FaultPlan,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    store: str | Path,
    resume: bool = False,
    shard: tuple[int, int] | None = None,
    ray: str | None = None,
    shards: int = 2,
    stop: Stop | None = None,
    block_size: int | None = None,
    progress: bool = True,
    batch_size: int = 32,
    restart: bool = True,
    cone: bool = True,
    mode: str = "exact",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    nan_to: str = "max",
    device: str | None = None,
) -> Summary:
    """Injects the faults of a plan, block by block, and keeps what each did in a store (`rom.campaign.read`).

    Ctrl-C (or SIGTERM) ends after the block under way; kill -9 loses that block and nothing else. However often a
    campaign was interrupted, killed, extended or shared out, its table is the same as in one go, bit for bit, on the
    same kind of machine.

    Args:
        model: in `eval()` mode, or its `rom.faults.survey`.
        plan: its strata name the model's layers. A longer version (`plan.extended`) continues a resumed campaign.
        inputs, labels: the evaluation set, [samples, …] and [samples].
        store: the file to write.
        resume: go on with what is there; otherwise an existing store is an error.
        shard: (i, n) runs only the blocks b with b mod n = i, for `merge` with the other shards.
        ray: address of a Ray cluster ("local" starts one here) whose `shards` workers run the blocks; this process
            stores them. Needs the extra `campaign`.
        stop: a rule for stopping before the plan ends; for plans that are random samples.
        block_size: faults that run together and are stored together. None: enough to fill the batches of every layer,
            or 256 where faults of weights meet all samples.
        progress: a bar or lines on standard error.
        batch_size, restart, cone, mode, bounds, nan_to, device: of `rom.campaign.Engine`.

    Raises:
        CampaignError: the store is of another campaign (both values are named), in use, damaged, or cannot be written;
            the plan was made for another model or data set.
        ValueError: arguments that do not fit.
    """
    _check(plan, inputs, labels, shard, ray, shards, stop, block_size)
    limits = {name: list(pair) for name, pair in bounds.items()} if bounds else None
    decisive = {"batch_size": batch_size, "mode": mode, "bounds": limits, "nan_to": nan_to if limits else None}
    identity = _identity(model, plan, inputs, labels, decisive)
    path, begun = Path(store), Store.exists(store)
    if begun:
        if not resume:
            raise CampaignError(f"{path} holds a campaign already. Resume it, or give another file.")
        with Store(path) as there:  # before anything slow
            _same_campaign(there, identity, plan, stop)
            if block_size not in (None, there.blocks.size):
                raise CampaignError(
                    f"{path} has blocks of {there.blocks.size} faults, got a block_size of {block_size}."
                )
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "restart": restart,
        "cone": cone,
        "mode": mode,
        "bounds": bounds,
    }
    settings |= {"nan_to": nan_to, "device": device}
    executor: Executor
    if ray is None:
        executor = Local(Engine(model, plan, inputs, labels, **settings))
    else:
        from rom.campaign.shards import Workers  # noqa: PLC0415 - needs an extra

        executor = Workers(ray, shards, model, plan, inputs, labels, settings)
    try:
        size = block_size or default_block_size(plan, batch_size)
        with _opened(path, begun, identity, plan, stop, size, executor.golden, device) as opened:
            return _Campaign(opened, executor, stop, shard, progress).run()
    finally:
        executor.close()


def default_block_size(plan: FaultPlan, batch_size: int) -> int:
    """A layer's last batch in a block is half empty on average: with 8 batches per layer that costs 6 %."""
    if any(stratum.samples is None for stratum in plan.strata):
        return 256  # such a fault has all samples, and batches, to itself
    return min(max(256, 8 * batch_size * len({stratum.layer for stratum in plan.strata})), 8192)


class _Campaign:
    """The loop."""

    def __init__(
        self, store: Store, executor: Executor, stop: Stop | None, shard: tuple[int, int] | None, progress: bool
    ) -> None:
        self.store, self.executor, self.stop = store, executor, stop
        index, of = shard or (0, 1)
        self.mine = range(index, len(store.blocks), of)
        self.faults = sum(len(store.blocks[b]) for b in self.mine)
        done = set(store.done().tolist())
        self.todo = dict.fromkeys(b for b in self.mine if b not in done)
        self.done = self.faults - sum(len(store.blocks[b]) for b in self.todo)
        self.progress = Progress(self.faults, self.done, shown=progress)

    def run(self) -> Summary:
        with Interrupts() as interrupts, self.progress:
            for last, look in self._goals():
                self._run_until(last, lambda: interrupts.received)
                if any(block < last for block in self.todo):
                    return self._summary("interrupted")
                if look is not None and self._narrow_enough(*look):
                    return self._summary("stopped")
        return self._summary("complete")

    def _goals(self) -> Iterator[tuple[int, tuple[int, float] | None]]:
        """Up to which block to run, and which look (faults, level) follows."""
        if self.stop is not None:
            schedule = self.stop.schedule(self.store.plan, self.store.blocks.size)
            for look in schedule.looks[:-1]:
                yield look // self.store.blocks.size, (look, schedule.level_of_each)
        yield len(self.store.blocks), None

    def _run_until(self, last: int, halted: Callable[[], bool]) -> None:
        now = [(block, self.store.blocks[block]) for block in self.todo if block < last]
        for block, results, seconds in self.executor.run(now, halted):
            self.store.add(block, results, seconds)
            del self.todo[block]
            self.done += len(results)
            self.progress.add(len(results))

    def _narrow_enough(self, look: int, level: float) -> bool:
        assert self.stop is not None
        table, blocks = self.store.results().table, self.store.blocks
        positions = np.sort(np.concatenate([blocks[b] for b in range(look // blocks.size)]))
        found = silent_rate(table[np.searchsorted(table["position"], positions)], self.store.plan, level)
        self.progress.say(f"look at {look:,} faults: silent corruptions {found} at level {level:.4g}")
        enough = max(found.high - found.value, found.value - found.low) <= self.stop.margin
        if enough:
            self.store.set("stopped", {"faults": look, "level": self.stop.level, "rate": list(found)})
        return enough

    def _summary(self, state: Literal["complete", "stopped", "interrupted"]) -> Summary:
        return Summary(state, self.done, self.faults, self.store.path)


def silent_rate(table: np.ndarray, plan: FaultPlan, level: float) -> statistics.Estimate:
    """sdc + critical, over all faults of the plan's population; of results that are its first ones."""
    totals = (table["sdc"] + table["critical"]).astype(np.float64)
    cells = table["cells"].astype(np.float64)
    if plan.scheme == "simple":
        return statistics.clustered(totals, cells, plan.population, level)
    parts = []
    for number, stratum in enumerate(plan.strata):
        mine = table["stratum"] == number
        known = statistics.clustered(totals[mine], cells[mine], stratum.size, level) if mine.any() else None
        parts.append(known or statistics.Estimate(0.5, 0.0, 1.0))  # nothing seen: it may be anything
    return statistics.stratified(parts, statistics.weights(plan.strata, "neuron").tolist())


# ------------------------------------------------------------------------------------------------ the same campaign?
def describe(engine: Engine) -> dict[str, Any]:
    """What a store keeps of the golden run; digests show whether another process computes the same."""
    golden = engine.golden
    logits, top1 = golden.logits.detach().float().cpu(), golden.top1.detach().cpu()
    best = logits.softmax(-1).topk(min(2, logits.shape[-1]), dim=-1).values
    return {
        "samples": len(top1),
        "accuracy": float(golden.accuracy),
        "loss": float(torch.as_tensor(golden.loss, dtype=torch.float64).mean()),
        "top2_difference": float((best[:, 0] - best[:, -1]).mean()),
        "answers": _digest(top1.long()),
        "logits": _digest(logits),
    }


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_fingerprint(inputs: torch.Tensor, labels: torch.Tensor) -> str:
    """A digest of an evaluation set, for `FaultPlan(data=…)`."""
    return _digest(inputs, labels)


def _identity(
    model: nn.Module | Survey,
    plan: FaultPlan,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides results, and FaultPlans that say which model and data they are for must be right."""
    prints = {
        "model": model_fingerprint(model.graph if isinstance(model, Survey) else model),
        "data": data_fingerprint(inputs, labels),
    }
    for name, value in prints.items():
        planned = getattr(plan, name)
        if planned and planned != value:
            raise CampaignError(f"the plan was made for another {name}: it says {planned}, this one is {value}.")
    return {"plan": plan.fingerprint(), **prints, **options}


def _same_campaign(store: Store, identity: Mapping[str, Any], plan: FaultPlan, stop: Stop | None) -> None:
    store.check(identity)
    rule, ours = store.get("stop"), asdict(stop) if stop else None
    if ours is not None and ours != rule:
        raise CampaignError(
            f"{store.path} has the stopping rule {rule}, got {ours}. Looks are fixed beforehand: give the same rule, "
            "or none to run the whole plan."
        )
    if ours is not None and plan.counts != store.plan.counts:
        raise CampaignError(
            f"{store.path} has a stopping rule for {len(store.plan)} faults, got a plan of {len(plan)}. Leave the rule "
            "out to extend the plan."
        )


def _opened(
    path: Path,
    begun: bool,
    identity: dict[str, Any],
    plan: FaultPlan,
    stop: Stop | None,
    block_size: int,
    golden: Mapping[str, Any],
    device: str | None,
) -> Store:
    """The store, made or found, with the plan extended to this one."""
    versions = {
        "rom": rom.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {device or ''}".strip(),
        "threads": torch.get_num_threads(),
    }
    if not begun:
        store = Store.create(path, plan, identity, block_size, golden)
        store.set("stop", asdict(stop) if stop else None)
        store.set("versions", versions)
        return store
    store = Store(path, write=True)
    try:
        _same_campaign(store, identity, plan, stop)
        if golden["answers"] != store.golden["answers"]:
            raise CampaignError(
                f"the model has the weights of the campaign in {path} and gives other answers: accuracy "
                f"{store.golden['accuracy']:.4f} there, {golden['accuracy']:.4f} here. Has its code changed?"
            )
        if golden["logits"] != store.golden["logits"]:
            warnings.warn(
                f"{path} was begun where the model's outputs differ in their last bits ({store.get('versions')} there, "
                f"{versions} here). The results are as good, but not those of one machine bit for bit.",
                stacklevel=3,
            )
        store.extend(plan)
        store.set("stop", asdict(stop) if stop else None)
        store.set("stopped", None)  # it is decided again, at the same look
    except BaseException:
        store.close()
        raise
    return store


def _check(
    plan: FaultPlan,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    shard: tuple[int, int] | None,
    ray: str | None,
    shards: int,
    stop: Stop | None,
    block_size: int | None,
) -> None:
    if len(inputs) != len(labels) or not len(labels):
        raise ValueError(f"rom.campaign.run: expected a label for every input, got {len(inputs)} and {len(labels)}.")
    if (block_size is not None and block_size < 1) or shards < 1:
        raise ValueError(f"rom.campaign.run: expected block_size and shards >= 1, got {block_size} and {shards}.")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"rom.campaign.run: expected a shard (i, n) with 0 <= i < n, got {shard}.")
    if shard is not None and (stop is not None or ray is not None):
        raise ValueError("rom.campaign.run: a shard cannot see the others: expected shard without stop and ray.")
    if stop is not None and plan.scheme not in ("simple", "stratified"):
        raise ValueError(
            f"rom.campaign.run: a plan of scheme {plan.scheme!r} is not in random order, so its beginning says nothing "
            "of the rest. Use stop with a simple or stratified plan."
        )


def merge(stores: Iterable[str | Path], into: str | Path) -> int:
    """Collects shards of one campaign in a store, a new one or one of them; returns how many faults were added.

    CampaignError: they are not of one campaign, or disagree.
    """
    paths = [Path(path) for path in stores]
    if not paths:
        raise ValueError("rom.campaign.merge: expected at least one store, got none.")
    added = 0
    with Store(into, write=True) if Store.exists(into) else _like(paths[0], into) as whole:
        for path in paths:
            if path.resolve() != Path(into).resolve():
                with Store(path) as part:
                    added += whole.merge(part)
    return added


def _like(path: Path, into: str | Path) -> Store:
    with Store(path) as first:
        store = Store.create(into, first.plan, first.identity, first.blocks.size, first.golden, first.stages())
        for key in ("stop", "versions"):
            store.set(key, first.get(key))
        return store
