"""Workers on a Ray cluster run the blocks of a campaign; the process that called `run` stores them.

Nothing is written where the workers are, so a worker or its whole machine may die at any moment: its block runs again
elsewhere, and a block is in the store once or not at all.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import rom
from rom.campaign.engine import Engine
from rom.campaign.errors import CampaignError
from rom.campaign.records import RESULT
from rom.faults import FaultPlan, Survey

DEATHS = 3  # of workers over one block, or in starting, until it is the work and not bad luck


class _Worker:
    """Runs in a process of its own, as a Ray actor."""

    def start(self, settings: Mapping[str, Any], threads: int, *given: Any) -> dict[str, Any]:
        """Builds the engine, with as many threads as the driver: sums depend on them."""
        from rom.campaign.runner import describe  # noqa: PLC0415 - it imports this module's user

        torch.set_num_threads(threads)
        self.engine = Engine(*given, **settings)
        return describe(self.engine) | {"rom": rom.__version__, "torch": torch.__version__}

    def run(self, positions: np.ndarray) -> tuple[bytes, float]:
        """The results of a block, as bytes, and the seconds they took."""
        started = time.perf_counter()
        return self.engine.run(positions).tobytes(), time.perf_counter() - started


class Workers:
    """`workers` Ray actors, each with the model, the data and one CPU (or GPU, where `settings` name one).

    address: of a cluster ("auto": the one of this machine), or "local" for one started here and now. CampaignError: no
    Ray, no such cluster, workers that keep dying, or that have other versions of rom or torch.
    """

    def __init__(
        self,
        address: str,
        workers: int,
        model: nn.Module | Survey,
        plan: FaultPlan,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        settings: Mapping[str, Any],
    ) -> None:
        try:
            import ray  # noqa: PLC0415 - an extra, and slow
        except ImportError as error:
            raise CampaignError("Ray is not installed. Run `pip install 'rom-kernels[campaign]'`.") from error
        self._ray, self._connected = ray, not ray.is_initialized()
        if self._connected:
            _connect(ray, address, workers)
        gpu = str(settings.get("device") or inputs.device).startswith("cuda")
        self._actor = ray.remote(num_cpus=1, num_gpus=int(gpu), max_restarts=0)(_Worker)
        self._shared = [ray.put(thing) for thing in (model, plan, inputs, labels)]
        self._start = dict(settings), torch.get_num_threads()
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # by what is awaited: the worker and its block
        self._idle: list[Any] = []
        self._deaths: Counter[int | None] = Counter()  # by block; None: in starting
        self.golden: dict[str, Any] = {}
        try:
            for _ in range(workers):
                self._spawn()
            while not self.golden:
                self._next(deque())
        except BaseException:
            self.close()
            raise

    def run(self, blocks: Iterable[tuple[int, np.ndarray]], halted: Callable[[], bool]) -> Iterator[tuple[Any, ...]]:
        """Runs blocks wherever a worker is free; those under way when it is halted are finished."""
        todo = deque(blocks)
        positions = dict(todo)
        while True:
            while todo and self._idle and not halted():
                block, faults = todo.popleft()
                worker = self._idle.pop()
                self._busy[worker.run.remote(faults)] = worker, block
            under_way = any(block is not None for _, block in self._busy.values())
            if not under_way and (halted() or not todo):
                return
            done = self._next(todo, positions)
            if done is not None:
                yield done

    def close(self) -> None:
        """Ends the workers and leaves the cluster."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)
        self._idle, self._busy = [], {}
        if self._connected:
            self._ray.shutdown()

    # ------------------------------------------------------------------------------------------------ workers
    def _spawn(self) -> None:
        worker = self._actor.remote()
        self._busy[worker.start.remote(*self._start, *self._shared)] = worker, None

    def _next(self, todo: deque[Any], positions: Mapping[int, np.ndarray] | None = None) -> tuple[Any, ...] | None:
        """Waits until something happens, at most a second; a block if that is what is ready."""
        ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=1.0)
        if not ready:
            return None
        worker, block = self._busy.pop(ready[0])
        try:
            value = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as error:  # the process, its machine or the way to it is gone
            self._deaths[block] += 1
            if self._deaths[block] >= DEATHS:
                what = "starting" if block is None else f"block {block}"
                raise CampaignError(
                    f"{DEATHS} workers died in {what} (the last: {str(error).splitlines()[0]}). Is there enough memory "
                    "for a worker on every node? What was done before is safe: resume."
                ) from error
            if block is not None and positions is not None:
                todo.appendleft((block, positions[block]))
            self._spawn()
            return None
        self._idle.append(worker)
        if block is None:
            self._deaths[None] = 0
            self._welcome(value)
            return None
        content, seconds = value
        return block, np.frombuffer(content, RESULT).copy(), seconds

    def _welcome(self, found: dict[str, Any]) -> None:
        """A worker has started: it must be one that computes what the others do."""
        for name, ours in (("rom", rom.__version__), ("torch", torch.__version__)):
            theirs = found.pop(name)
            if theirs != ours:
                raise CampaignError(f"a Ray worker has {name} {theirs}, this process {ours}. Install the same.")
        if self.golden and found["logits"] != self.golden["logits"]:
            raise CampaignError(
                "the Ray cluster has machines on which the model's outputs differ in their last bits: their results "
                "would not be those of one process. Run on machines of one kind."
            )
        self.golden = found


def _connect(ray: Any, address: str, workers: int) -> None:
    options = {"num_cpus": workers} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for more than nine minutes, in silence
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", include_dashboard=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise CampaignError(
            f"cannot reach a Ray cluster at {address!r} ({str(error).splitlines()[0]}). Start one with `ray start "
            '--head`, or use "local".'
        ) from error
