"""What makes a text-guided classifier resilient: its text, its cosine, or the clamp of the fault injector?

    python examples/text_guided_ablation.py --out runs/text_guided

Trains every head of `rom.models.text_guided.ablation` on the digits of scikit-learn, or on pairs of them (100 classes),
several seeds each, flips single bits in the results of all layers, with and without the clamp, and writes a table
(Markdown and CSV) and a plot. Interrupt and repeat the command to go on. `--quick` shows in a minute that it runs; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rom import files
from rom.models import text_guided
from rom.models.fedfd.study import interval
from rom.models.text_guided import ablation
from rom.models.text_guided.ablation_data import DATA

BASE = "linear"
NAME = "text_guided_ablation"
CLAMPS = {"profiled": "with the profiled clamp", "none": "without a clamp"}
MEANS = {
    "shared": "the layers that the linear model has as well",
    "overall": "all layers of the model, the projection included",
}
METRICS = {"delta_loss": "ΔLoss", "mismatch": "mismatch"}
COLOURS = ["#6a9a3b", "#1f4e79", "#5b8db8", "#a9c4dc", "#c0504d", "#e0a5a3"]


def main() -> int:
    """Measures what is not measured yet, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/text_guided"), metavar="DIR")
    parser.add_argument("--data", choices=list(DATA), default="digits", help="10 classes, or 100 (default digits)")
    parser.add_argument("--trunk", choices=list(ablation.TRUNKS), default="cnn", help="below the heads (default cnn)")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="2 or more (default 10)")
    parser.add_argument("--faults", type=int, default=40960, metavar="N", help="per layer and clamp (default 40960)")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="of every training (default 30)")
    parser.add_argument("--learning-rate", type=float, default=0.1, metavar="R", help="of SGD (default 0.1)")
    parser.add_argument("--width", type=int, default=512, metavar="E", help="of the embedding (default 512)")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 epochs, 40 test images, 500 faults")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.faults = 2, 3, 500
    if args.seeds < 2 or min(args.faults, args.epochs, args.width, args.threads) < 1:
        parser.error("expected at least 2 seeds, and positive numbers")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = text_guided.Recipe(args.epochs, batch_size=64, learning_rate=args.learning_rate, schedule="cosine")
    settings = {
        "data": args.data,
        "trunk": args.trunk,
        "faults": args.faults,
        "width": args.width,
        "test": 0.0225 if args.quick else 0.25,
        "recipe": asdict(recipe),
    }
    records = []
    for seed in range(args.seeds):
        path = args.out / f"seed-{seed}.json"
        record = resumed(path, settings)
        if record is None:
            start = time.monotonic()
            record = {"settings": settings, "heads": one_seed(seed, settings, recipe)}
            with files.replacing(path) as partial:
                partial.write_text(json.dumps(record))
            print(f"seed {seed}: {time.monotonic() - start:.0f} s, {args.seeds - seed - 1} to come", flush=True)
        records.append(record["heads"])
    print(report(args.out, records, settings))
    return 0


def resumed(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call measured; None if nothing. SystemExit if it measured something else."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} was measured with other settings: {record['settings']}. Give another --out.")
    return record


def one_seed(seed: int, settings: dict[str, Any], recipe: text_guided.Recipe) -> Any:
    """Trains and measures every head; a seed has its own split, initial values, order of images, and faults."""
    data = DATA[settings["data"]](seed, settings["test"], settings["width"])
    models = {}
    for head in ablation.HEADS:
        model = ablation.build(head, data.text, seed, settings["trunk"], data.train.images.shape[1:])
        text_guided.train(model, data.train, recipe, seed)
        models[head] = model
        print(f"seed {seed}: {head}: accuracy {ablation.answers(model, data.test)[0]:.3f}", flush=True)
    return ablation.measure(models, data.train, data.test, settings["faults"], seed)


# ---------------------------------------------------------------------------------------------------- statistics
def layers_of(records: Sequence[Any], head: str) -> list[str]:
    """Its layers in order."""
    return list(dict.fromkeys(d["layer"] for d in records[0][head]["damage"]))


def values(records: Sequence[Any], head: str, clamp: str, layer: str, metric: str) -> np.ndarray:
    """One value per seed; for the names in `MEANS`, the mean over several layers, all layers counting alike."""
    names = layers_of(records, BASE if layer == "shared" else head) if layer in MEANS else [layer]
    found = [
        [d[metric] for d in record[head]["damage"] if d["clamp"] == clamp and d["layer"] in names] for record in records
    ]
    return np.array(found, np.float64).mean(1) if found[0] else np.full(len(records), np.nan)


def improvement(base: np.ndarray, ours: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean over seeds of base / ours, and its 95 % interval: Student's t of the logarithms.

    The pairs share split, trunk, images and, where layers are the same, faults. NaN where a seed has no damage at all.
    """
    if not (np.minimum(base, ours) > 0).all():
        return (math.nan,) * 3
    mean, half = interval(np.log(base / ours))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


# ---------------------------------------------------------------------------------------------------- reporting
def report(out: Path, records: Sequence[Any], settings: dict[str, Any]) -> str:
    """Writes the table, its rows as CSV, and the plot; returns the table."""
    images = [record[BASE]["images"] for record in records]
    lines = [
        f"Data {settings['data']}, trunk {settings['trunk']}, {len(records)} seeds, "
        f"{settings['recipe']['epochs']} epochs, {min(images)} to {max(images)} test images, {settings['faults']} "
        "faults per layer and clamp, all faults of the last layer. Mean or, for ratios, geometric mean over seeds "
        "[95 % interval, Student's t].",
        "",
        "| head | accuracy | Top-2 difference | scale × bound of the last layer |",
        "|---|---|---|---|",
    ]
    for head in records[0]:
        cells = ["{:.4f} ± {:.4f}".format(*interval([r[head][k] for r in records])) for k in _PLAIN]
        reach = [
            r[head]["scale"] * next(d["bound"] for d in r[head]["damage"] if d["layer"] == ablation.LAST)
            for r in records
        ]
        lines.append(f"| {head} | {cells[0]} | {cells[1]} | {np.mean(reach):.1f} |")
    spread = np.array([[record[head]["accuracy"] for head in record] for record in records]).mean(0)
    lines += ["", f"Accuracies of the heads lie within {100 * np.ptp(spread):.2f} points.", ""]
    rows = _ratios(records)
    for clamp, words in CLAMPS.items():
        lines += _table(rows, clamp, words)
    table = "\n".join(lines)
    (out / f"{NAME}.md").write_text(table + "\n", encoding="utf-8")
    with (out / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(out / f"{NAME}.png", rows, records)
    return table


_PLAIN = ("accuracy", "top2_difference")


def _ratios(records: Sequence[Any]) -> list[dict[str, Any]]:
    """A row per head, clamp and layer."""
    rows = []
    for clamp in CLAMPS:
        for head in records[0]:
            for layer in [*layers_of(records, head), *MEANS]:
                row: dict[str, Any] = {"clamp": clamp, "head": head, "layer": layer}
                for metric in METRICS:
                    ours = values(records, head, clamp, layer, metric)
                    base = values(records, BASE, clamp, layer, metric)
                    row[metric] = ours.mean()
                    names = (f"{metric}_ratio", f"{metric}_low", f"{metric}_high")
                    row |= dict(zip(names, improvement(base, ours)))
                row["due"] = values(records, head, clamp, layer, "due").mean()
                rows.append(row)
    return rows


def _table(rows: Sequence[dict[str, Any]], clamp: str, words: str) -> list[str]:
    layers = {ablation.LAST: "last layer", "shared": "shared layers", "overall": "overall"}
    heads = [f"{label}, {shown}" for label in METRICS.values() for shown in layers.values()]
    lines = [
        f"Single bit flips {words}: damage to the linear model, and below how many times less it is with other heads "
        "(above 1: more resilient), with the ratio's interval. Mismatch counts NaN and infinite logits; ΔLoss is the "
        "mean over the other faults. Shared layers: those the linear model has as well; overall: also the projection.",
        "",
        "| head | " + " | ".join(heads) + " | NaN or infinite |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for head in dict.fromkeys(row["head"] for row in rows):
        mine = {row["layer"]: row for row in rows if row["clamp"] == clamp and row["head"] == head}
        cells = [_cell(head, mine[layer], metric) for metric in METRICS for layer in layers]
        lines.append(f"| {head} | " + " | ".join(cells) + f" | {100 * mine['overall']['due']:.2f} % |")
    return [*lines, ""]


def _cell(head: str, row: dict[str, Any], metric: str) -> str:
    if head == BASE:
        return f"{100 * row[metric]:.3f} %" if metric == "mismatch" else f"{row[metric]:.3g}"
    ratio, low, high = (row[f"{metric}_{part}"] for part in ("ratio", "low", "high"))
    return "–" if math.isnan(ratio) else f"{ratio:.2f} [{low:.2f}, {high:.2f}]" if high < 1e4 else f"{ratio:.0e}"


def plot(path: Path, rows: Sequence[dict[str, Any]], records: Sequence[Any]) -> None:
    """Improvement over the linear model by layer, a panel per clamp and metric; the last layer's mismatch by bit."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(len(CLAMPS), len(METRICS) + 1, squeeze=False)
    for line, (clamp, words) in zip(panels, CLAMPS.items()):
        mine = [row for row in rows if row["clamp"] == clamp]
        for axes, (metric, label) in zip(line, METRICS.items()):
            _layers_panel(axes, mine, metric)
            axes.set_title(f"{label} of linear / {label}, {words}", fontsize=9)
        _bits_panel(line[-1], records, clamp)
        line[-1].set_title(f"last layer, {words}", fontsize=9)
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=120)


def _layers_panel(axes: Any, rows: Sequence[dict[str, Any]], metric: str) -> None:
    layers = list(dict.fromkeys(row["layer"] for row in rows if row["head"] == BASE))
    heads = [head for head in dict.fromkeys(row["head"] for row in rows) if head != BASE]
    for place, (head, colour) in enumerate(zip(heads, COLOURS)):
        mine = {row["layer"]: row for row in rows if row["head"] == head}
        at = np.arange(len(layers)) + (place - (len(heads) - 1) / 2) * 0.13
        ratio, low, high = (np.array([mine[x][f"{metric}_{p}"] for x in layers]) for p in ("ratio", "low", "high"))
        axes.errorbar(at, ratio, [ratio - low, high - ratio], fmt="o", ms=4, color=colour, label=head, lw=1.2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1e4 * low:  # plain numbers, also between the powers of ten where there is room
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 15 * low else "")
    axes.set_xticks(range(len(layers)), [x.removeprefix("backbone.features.") for x in layers])
    axes.grid(alpha=0.25, axis="y")


def _bits_panel(axes: Any, records: Sequence[Any], clamp: str) -> None:
    for head, colour in zip(records[0], ["black", *COLOURS]):
        found = [
            d["by_bit"]
            for record in records
            for d in record[head]["damage"]
            if d["layer"] == ablation.LAST and d["clamp"] == clamp
        ]
        axes.plot(range(32), np.mean(found, 0), marker=".", color=colour, linewidth=1, label=head)
    axes.set(xlim=(18, 32), xlabel="bit that is flipped (23–30: exponent, 31: sign)", ylabel="mismatch")
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(main())
