"""The training loop. It knows no model: a `Task` says what a batch, the loss and a good model are.

Everything that decides the weights is a function of the settings and the step, or is in the checkpoint, so a run that
was killed and resumed ends in the same weights, bit for bit, as one that was not (when its length is given in steps:
with `minutes` the schedule follows the clock).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rom.interrupts import Interrupts
from rom.training import checkpoint, optimizer
from rom.training.errors import CheckpointError, TrainingError
from rom.training.report import Reporter


class Task(Protocol):
    """What is trained: the loop asks it for everything that depends on the data or the model.

    Attributes:
        criterion: the key of `evaluate` whose lowest value marks the best model.
        unit: what `size` counts.
    """

    criterion: str
    unit: str

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step, a pure function of the step."""

    def size(self, batch: torch.Tensor) -> int:
        """How many `unit`s are in a batch, for the rate."""

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """A scalar to minimise."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures of merit; the model is in evaluation mode and no gradients are recorded."""

    def statistics(self, model: nn.Module) -> dict[str, Any]:
        """More for the log, after a training step."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model for use, each file complete or not at all."""


@dataclass(frozen=True)
class Settings:
    """How long and how to train.

    Args:
        steps: optimiser steps; None leaves the end to `minutes`.
        minutes: wall-clock time of the whole run, resumptions included; None leaves the end to `steps`. With both,
            whichever comes first ends the run and drives the schedule.
        learning_rate: at its peak.
        weight_decay, betas: of AdamW.
        clip: largest norm of the gradient.
        warmup, final: of `optimizer.warmup_cosine`.
        evaluate_every: steps between evaluations; None evaluates after each tenth of the run. Each writes a checkpoint.
        save_every: steps between further checkpoints; None writes them at evaluations only.
        log_every: steps between log records.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup: float = 0.03
    final: float = 0.1
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("Settings: expected steps, minutes or both, got neither.")
        for name in ("steps", "minutes", "learning_rate", "clip", "evaluate_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Settings: expected {name} > 0, got {value}.")


@dataclass
class Progress:
    """Where a run stands; with the tensors, all that a checkpoint needs."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    latest: float = math.inf


class Trainer:
    """Trains `model` on `task` and leaves in `folder` the best model, checkpoints, a log and plots.

    Args:
        model: on its device; its parameters are changed in place.
        task: data, loss and evaluation.
        settings: length, learning rate and so on.
        folder: exists already.
        reporter: gets every log record.
        identity: what makes this run the same run (data, model, seed): kept in the checkpoint, and resuming with
            another one is refused.

    After `run`, `progress` has the step and the best criterion, and `interrupted` says whether SIGINT or SIGTERM ended
    it early.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Settings,
        folder: Path,
        reporter: Reporter,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.task, self.settings, self.folder = model, task, settings, folder
        self.reporter, self.identity = reporter, dict(identity)
        self.optimizer = optimizer.adamw(model, settings.learning_rate, settings.weight_decay, settings.betas)
        self.device = next(model.parameters()).device
        self.progress = Progress()
        self.interrupted = False
        self._started = time.monotonic()
        self._losses: list[torch.Tensor] = []  # since the last log record; read there, so a GPU is not waited for
        self._units, self._clock = 0, 0.0
        self._gradient_norm = torch.zeros(())

    # ------------------------------------------------------------------------------------------------ the run
    def resume(self) -> None:
        """Continues from the folder's last intact checkpoint.

        Raises:
            CheckpointError: there is none, or it belongs to another run.
        """
        tensors, state = checkpoint.load(self.folder, self.reporter.warn)
        if state["identity"] != self.identity:
            changed = [key for key in self.identity if state["identity"].get(key) != self.identity[key]]
            raise CheckpointError(
                f"the checkpoint in {self.folder} is of another run: {', '.join(changed)} differ. Resume with the "
                "arguments the run was started with, or start anew in another folder."
            )
        checkpoint.restore(self.folder, self.model, self.optimizer, tensors)
        self.progress = Progress(**state["progress"])
        self.reporter.rewind(self.progress.step)

    def run(self) -> Progress:
        """Trains to the end, or until SIGINT or SIGTERM, after which the checkpoint is that of the last step done."""
        self._started, self._clock = time.monotonic() - self.progress.seconds, self.progress.seconds
        self.model.train()
        self.reporter.begin()
        fraction = self._fraction()
        with Interrupts() as interrupts:
            while fraction < 1 and not interrupts.received:
                before = fraction
                self._step(before)
                fraction = self._fraction()
                self._after_step(before, fraction)
            self.interrupted = fraction < 1
            if self.interrupted:
                self._save()
        self.reporter.end()
        return self.progress

    def _fraction(self) -> float:
        """How much of the run is done; it drives the schedule, so it depends on the clock only with `minutes`."""
        by_steps = self.progress.step / self.settings.steps if self.settings.steps else 0.0
        if self.settings.minutes is None:
            return by_steps
        return max(by_steps, (time.monotonic() - self._started) / (60 * self.settings.minutes))

    def _step(self, fraction: float) -> None:
        settings = self.settings
        if settings.steps is not None:  # a step is ruled by the schedule at its end, so the first one moves
            fraction = max(fraction, (self.progress.step + 1) / settings.steps)
        factor = optimizer.warmup_cosine(fraction, settings.warmup, settings.final)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        batch = self.task.batch(self.progress.step).to(self.device)
        loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.progress.step += 1
        self._losses.append(loss.detach())
        self._units += self.task.size(batch)

    def _after_step(self, before: float, fraction: float) -> None:
        settings, step = self.settings, self.progress.step
        if settings.evaluate_every:
            evaluate = step % settings.evaluate_every == 0 or fraction >= 1
        else:
            evaluate = math.floor(10 * fraction) > math.floor(10 * before)
        if step % settings.log_every == 0 or evaluate:
            self._log(fraction)
        if evaluate:
            self._evaluate()
        if evaluate or (settings.save_every and step % settings.save_every == 0):
            self._save()

    # ------------------------------------------------------------------------------------------------ pieces
    def _log(self, fraction: float) -> None:
        if not self._losses:
            return
        loss = torch.stack(self._losses).mean().item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} before step {self.progress.step}: training diverged. Lower the learning rate (now "
                f"{self.settings.learning_rate}); the checkpoints in {self.folder} are from before that."
            )
        now = time.monotonic() - self._started
        self.reporter.train(
            step=self.progress.step,
            fraction=fraction,
            loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            gradient_norm=float(self._gradient_norm),
            rate=self._units / max(now - self._clock, 1e-9),
            seconds=now,
            **self.task.statistics(self.model),
        )
        self._losses, self._units, self._clock = [], 0, now

    def _evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            figures = self.task.evaluate(self.model)
        self.model.train()
        value = figures[self.task.criterion]
        self.progress.latest = value
        best = value < self.progress.best
        if best:
            self.progress.best, self.progress.best_step = value, self.progress.step
            try:
                self.task.save(self.model, self.folder)
            except OSError as error:
                raise CheckpointError(f"cannot write the model to {self.folder} ({error}).") from error
        self._clock = time.monotonic() - self._started  # the rate is that of training
        self.reporter.evaluation(step=self.progress.step, seconds=self._clock, best=best, **figures)

    def _save(self) -> None:
        self._log(self._fraction())  # a checkpoint of a diverged model would replace a good one
        self.progress.seconds = time.monotonic() - self._started
        state = {"progress": vars(self.progress), "identity": self.identity, "step": self.progress.step}
        checkpoint.save(self.folder, self.model, self.optimizer, state)
