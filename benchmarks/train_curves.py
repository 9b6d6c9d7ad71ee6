"""A small Routing Mamba language model trained on the CPU and on the GPU from the same weights and batches.

    python benchmarks/train_curves.py --device cuda --plot curves.png

Two layers, four experts, the language reference inside Python as text. The measure is the CPU's own rounding noise: how
far its bfloat16 run (autocast) strays from its float32 run. The GPU's curves, in float32 and bfloat16, must stay within
twice that of the CPU's float32 curve. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import rom
from rom.training.data import WindowBatches, python_reference
from rom.training.optimizer import adamw

SMOOTHING = 5  # steps: the loss of one batch says little
LEAST = 0.01  # nats; below this nobody could tell two curves apart


@dataclass
class Curve:
    """The training loss in nats per byte, step by step."""

    name: str
    losses: list[float]
    seconds: float

    def smooth(self) -> list[float]:
        """Means over the last SMOOTHING steps."""
        windows = (self.losses[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(self.losses)))
        return [sum(window) / len(window) for window in windows]

    def distance(self, other: Curve) -> float:
        """The largest difference between the smoothed curves."""
        return max(abs(a - b) for a, b in zip(self.smooth(), other.smooth()))


def train(device: str, dtype: torch.dtype, steps: int, length: int) -> Curve:
    """From seed 0: the weights are drawn on the CPU, so that every device starts with the same."""
    torch.manual_seed(0)
    config = rom.models.RoutingMambaConfig(vocab_size=256, d_model=96, n_layer=2, num_experts=4)
    model = rom.models.RoutingMambaLM(config).to(device)
    batches = WindowBatches(python_reference().tokens, batch_size=8, sequence_length=length)
    optimizer, losses, start = adamw(model, 3e-3, 0.1), [], time.perf_counter()
    for step in range(steps):
        tokens = batches.batch(step).to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    name = f"{device} {str(dtype).removeprefix('torch.')}"
    print(f"{name}: {losses[0]:.4f} … {losses[-1]:.4f} nats per byte", flush=True)
    return Curve(name, losses, time.perf_counter() - start)


def plot(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for curve, style in zip(curves, ("-", "--", "-", "--")):
        axis.plot(curve.smooth(), style, label=curve.name, linewidth=1)
    axis.set(xlabel="step", ylabel=f"nats per byte, mean of {SMOOTHING} steps")
    axis.legend()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="held against the CPU")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="bytes in each of the 8 sequences of a batch")
    for kind in ("json", "markdown", "plot"):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    curves: list[Curve] = []
    for device in ("cpu", options.device):
        for dtype in (torch.float32, torch.bfloat16):
            curves.append(train(device, dtype, options.steps, options.length))
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(vars(curves[-1])) + "\n")
    truth, rounded, *judged = curves
    bound = max(LEAST, 2 * truth.distance(rounded))
    lines = ["| curve | last loss | strays from cpu float32 by | bound | seconds |", "|---|---|---|---|---|"]
    for curve in curves:
        limit = f"{bound:.4f}" if curve in judged else ""
        cells = [curve.name, f"{curve.smooth()[-1]:.4f}", f"{curve.distance(truth):.4f}", limit, f"{curve.seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = f"## {options.steps} training steps, CPU and {options.device}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        plot(curves, options.plot)
    strayed = [curve.name for curve in judged if not curve.distance(truth) <= bound]
    print(f"{', '.join(strayed)} left the bound" if strayed else "every curve is within the bound")
    return int(bool(strayed))


if __name__ == "__main__":
    sys.exit(main())
