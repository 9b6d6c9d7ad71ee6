"""Several methods over several seeds: what `rom fed` runs, and what it leaves behind."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rom import files
from rom.models.fedfd.aggregation import State, Update
from rom.models.fedfd.clients import FeatureClassifier
from rom.models.fedfd.data import Images, Split, split
from rom.models.fedfd.distillation import METHODS
from rom.models.fedfd.federation import Federation, Settings, pooled_accuracy

CHECKPOINT, ROUNDS, TABLE, PLOT = "checkpoint.safetensors", "rounds.csv", "table.md", "accuracy.png"
GLOBAL, MEAN = "global", "mean of groups"

#: Runs a federation's remaining rounds and calls the function after each: `Federation.run` or `flower.simulate`.
Engine = Callable[[Federation, Callable[[dict[str, Any]], None]], None]


def run(
    data: Images,
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    resume: bool,
    engine: Engine = Federation.run,
) -> list[dict[str, object]]:
    """Runs every method with every seed, each in a subfolder with its checkpoint; returns and writes all rounds.

    A killed study goes on with `resume` where it stopped, at the last finished round, with whatever engine.

    Raises:
        ValueError: an unknown method, or a checkpoint of other settings.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"expected methods of {', '.join(METHODS)}, got {', '.join(unknown)}.")
    rows: list[dict[str, object]] = []
    for seed in seeds:
        parts = split(data, seed)
        trained: _Trained = {}
        for method in methods:
            how = replace(settings.distillation, **METHODS[method])  # type: ignore[arg-type]
            federation = _Remembering(parts, replace(settings, seed=seed, distillation=how), trained)
            _finish(federation, folder / f"{method}-{seed}", resume, f"{method}, seed {seed}", engine)
            rows += [_row(method, seed, settings.groups[0].name, record) for record in federation.history]
        ceiling = pooled_accuracy(parts, replace(settings, seed=seed))
        rows.append({"method": "pooled", "seed": seed, "round": settings.rounds - 1, GLOBAL: ceiling, MEAN: ceiling})
    with files.replacing(folder / ROUNDS) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


_Trained = dict[tuple[int, int, bytes], Update]


class _Remembering(Federation):
    """Methods differ in the global model: what all other clients do from the same weights is done once per seed.

    Of the three default architectures the global one is the fastest to train: 12 rounds of a seed's first method take
    15 to 20 s of CPU time, of every other 5 to 7.
    """

    def __init__(self, split: Split, settings: Settings, trained: _Trained) -> None:
        super().__init__(split, settings)
        self._trained = trained

    def train_client(self, model: FeatureClassifier, state: State, client: int) -> Update:
        weights = hashlib.blake2b()
        for tensor in state.values():
            weights.update(tensor.contiguous().numpy().data)
        key = (self.round, client, weights.digest())
        if key not in self._trained:
            self._trained[key] = super().train_client(model, state, client)
        return self._trained[key]


def _finish(federation: Federation, folder: Path, resume: bool, name: str, engine: Engine) -> None:
    checkpoint = folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        if not resume:
            raise ValueError(f"{folder} holds a run already. Continue it with --resume, or give another --out.")
        federation.load(checkpoint)

    def after_round(record: dict[str, Any]) -> None:
        federation.save(checkpoint)
        (folder / "history.json").write_text(json.dumps(federation.history, indent=1))
        shown = "  ".join(f"{group} {value:.3f}" for group, value in record["accuracy"].items())
        print(f"{name}: round {federation.round} of {federation.settings.rounds}  {shown}", file=sys.stderr, flush=True)

    if federation.round < federation.settings.rounds:
        engine(federation, after_round)


def _row(method: str, seed: int, group: str, record: dict[str, object]) -> dict[str, object]:
    accuracies = record["accuracy"]
    assert isinstance(accuracies, dict)
    mean = float(np.mean(list(accuracies.values())))
    return {"method": method, "seed": seed, "round": record["round"], GLOBAL: accuracies[group], MEAN: mean}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of Student's 95 % interval; NaN half width for a single value."""
    from scipy import stats  # noqa: PLC0415 - an extra

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Accuracy after the last round per method, mean ± 95 % interval over seeds, as Markdown.

    With fedavg among the methods also the differences from it, seed by seed: splits differ more than methods do.
    """
    last = max(int(str(row["round"])) for row in rows)
    final: dict[str, dict[int, dict[str, object]]] = {}
    for row in rows:
        if int(str(row["round"])) == last:
            final.setdefault(str(row["method"]), {})[int(str(row["seed"]))] = row
    lines = [f"| method | {GLOBAL} model | over fedavg | {MEAN} | seeds |", "|---|---|---|---|---|"]
    for method, runs in final.items():
        base = final.get("fedavg", {})
        cells = [
            _cell([_value(row, GLOBAL) for row in runs.values()]),
            _cell([_value(row, GLOBAL) - _value(base[seed], GLOBAL) for seed, row in runs.items() if seed in base], "+")
            if method != "fedavg"
            else "",
            _cell([_value(row, MEAN) for row in runs.values()]),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def _value(row: dict[str, object], column: str) -> float:
    return float(str(row[column]))


def _cell(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:{sign}.3f}"


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """The global model's accuracy per round, a band of one standard deviation over seeds around each mean."""
    import matplotlib  # noqa: PLC0415 - an extra

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds = sorted({int(str(row["seed"])) for row in mine})
        curves = np.array([[_value(row, GLOBAL) for row in mine if row["seed"] == seed] for seed in seeds])
        if method == "pooled":
            axes.axhline(curves.mean(), color="gray", linestyle="--", label="pooled data")
            continue
        rounds, mean, deviation = np.arange(1, curves.shape[1] + 1), curves.mean(0), curves.std(0)
        (line,) = axes.plot(rounds, mean, label=method)
        axes.fill_between(rounds, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="round", ylabel="test accuracy of the global model", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
