"""What a run tells: a progress bar or plain lines, a JSONL log, and plots drawn from the log."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rom import files

LOG, LOSS_PLOT, LOAD_PLOT = "log.jsonl", "loss.png", "experts.png"
LINE_SECONDS = 5.0  # between plain progress lines
BITS = math.log2(math.e)  # per nat


class Reporter:
    """Writes log records to `folder/log.jsonl` and shows progress on standard error.

    A terminal gets a bar when tqdm is installed; files, pipes and machines without tqdm get a line every few seconds.
    """

    def __init__(self, folder: Path, unit: str) -> None:
        self.path, self.unit = folder / LOG, unit
        self._bar: Any = None
        self._last_line = -math.inf

    # ------------------------------------------------------------------------------------------------ the log
    def rewind(self, step: int) -> None:
        """Drops the records after `step`: a resumed run writes them again."""
        kept = [record for record in read_log(self.path) if record["step"] <= step] if self.path.exists() else []
        with files.replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def record(self, event: str, **values: Any) -> None:
        """Appends one line to the log."""
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"event": event, **values}) + "\n")

    # ------------------------------------------------------------------------------------------------ the console
    def begin(self) -> None:
        """The loop starts."""
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm  # noqa: PLC0415 - an extra
        except ImportError:
            return
        shape = "{percentage:3.0f}%|{bar}| {desc}"
        self._bar = tqdm(total=1.0, bar_format=shape, dynamic_ncols=True, leave=False)

    def train(self, *, fraction: float, **record: Any) -> None:
        """A record of training since the last one."""
        self.record("train", **record)
        remaining = record["seconds"] * (1 / fraction - 1) if fraction > 0 else math.inf
        text = (
            f"step {record['step']}  loss {record['loss']:.3f} ({record['loss'] * BITS:.3f} bits)  "
            f"{record['rate']:,.0f} {self.unit}/s  ETA {_clock(remaining)}"
        )
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = min(fraction, 1.0)
            self._bar.refresh()
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._say(f"{min(fraction, 1):4.0%}  {text}")

    def evaluation(self, *, step: int, seconds: float, best: bool, **figures: float) -> None:
        """A record of an evaluation."""
        self.record("evaluation", step=step, seconds=seconds, best=best, **figures)
        named = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
        self._say(f"step {step}  {_clock(seconds)}  validation: {named}{'  (best so far)' if best else ''}")

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self._say(f"warning: {text}")

    def end(self) -> None:
        """The loop is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a killed run left half-written is ignored."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


# ---------------------------------------------------------------------------------------------------- plots
def plot_loss(folder: Path, criterion: str, baseline: tuple[str, float] | None = None) -> Path:
    """Training loss (in bits) and the validation criterion over the steps, and a horizontal line to compare with."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import

    records = read_log(folder / LOG)
    training = [record for record in records if record["event"] == "train"]
    validation = [record for record in records if record["event"] == "evaluation"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [record["step"] for record in training],
        [record["loss"] * BITS for record in training],
        color="#9db4c8",
        linewidth=1,
        label="training",
    )
    axes.plot(
        [record["step"] for record in validation],
        [record[criterion] for record in validation],
        color="#1f4e79",
        marker="o",
        markersize=3.5,
        label="validation",
    )
    if baseline is not None:
        axes.axhline(
            baseline[1], color="#c0504d", linestyle="--", linewidth=1, label=f"{baseline[0]} ({baseline[1]:.3f})"
        )
    axes.set(xlabel="step", ylabel=criterion.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(folder / LOSS_PLOT, dpi=150)
    return folder / LOSS_PLOT


def plot_load(folder: Path) -> Path | None:
    """Which fraction of the tokens each expert got over the steps, a panel per layer; None without experts."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    records = [record for record in read_log(folder / LOG) if record["event"] == "train" and "load" in record]
    if not records:
        return None
    steps = [record["step"] for record in records]
    layers, experts = len(records[0]["load"]), len(records[0]["load"][0])
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 1.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for layer, axes in enumerate(panels):
        if layer >= layers:
            axes.set_axis_off()
            continue
        axes.stackplot(steps, [[record["load"][layer][expert] for record in records] for expert in range(experts)])
        axes.set(title=f"layer {layer}", ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    figure.supxlabel("step")
    figure.supylabel("fraction of tokens per expert")
    figure.savefig(folder / LOAD_PLOT, dpi=150)
    return folder / LOAD_PLOT
