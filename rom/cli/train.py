"""Train a Routing Mamba on text, byte by byte, and compare it with an n-gram.

Without --text it learns the language reference inside Python, so it needs no download. The first 90 % of the bytes are
trained on and the rest validates, in one piece each. In DIR it leaves config.json and model.safetensors (the best model
by validation), checkpoint.safetensors (the last state, for --resume) and the one before it, log.jsonl, loss.png and
experts.png.

Validation figures are bits per byte over the whole validation part: every byte of it but the first is predicted once,
from the bytes before it, at least half a --sequence-length and at most two of them. The n-gram, of order 4, learns from
the same bytes and predicts the same ones.

Ctrl-C saves and stops; a second one stops at once. Runs given in --steps are reproducible bit for bit on
one machine, killed and resumed or not.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from rom.cli.options import natural_int, non_negative_float, positive_float, positive_int, select_device
from rom.training.errors import TrainingError

DEFAULT_MINUTES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    data = parser.add_argument_group("text")
    data.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files, and folders of them (recursively)")
    data.add_argument(
        "--errors",
        choices=("strict", "skip", "keep"),
        default="strict",
        help="files that are not UTF-8: stop (strict, default), leave them out (skip), take their bytes (keep)",
    )
    data.add_argument("--validation", type=float, default=0.1, metavar="FRACTION", help="to validate on (default 0.1)")

    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="tiny", help="tiny (default), 115m, 353m, 765m or 1.3b")
    model.add_argument(
        "--num-experts", type=positive_int, metavar="E", help="experts per projection, instead of the preset's"
    )
    model.add_argument(
        "--top-k", type=positive_int, metavar="K", help="experts each byte meets, instead of the preset's"
    )
    model.add_argument("--dense", action="store_true", help="the dense twin: one expert, equal active parameters")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    run.add_argument("--steps", type=positive_int, metavar="N", help="length of the run in optimiser steps")
    run.add_argument(
        "--minutes",
        type=positive_float,
        metavar="M",
        help=f"its length by the clock (default {DEFAULT_MINUTES:g} unless --steps); the earlier of both ends it",
    )
    run.add_argument("--resume", action="store_true", help="go on from DIR's last intact checkpoint (same arguments)")
    run.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="sequences per step (default 8)")
    run.add_argument("--sequence-length", type=positive_int, default=512, metavar="N", help="bytes each (default 512)")
    run.add_argument("--lr", type=positive_float, default=3e-3, help="peak learning rate (default 3e-3)")
    run.add_argument(
        "--weight-decay",
        type=non_negative_float,
        default=0.1,
        help="of matrices (default 0.1; about 1 holds overfitting of a small text back)",
    )
    run.add_argument("--seed", type=natural_int, default=0, help="of weights and batches (default 0)")
    run.add_argument("--eval-every", type=positive_int, metavar="N", help="steps (default: ten times in the run)")
    run.add_argument("--save-every", type=positive_int, metavar="N", help="steps between further checkpoints")
    run.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    run.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Trains; 0, or 130 when interrupted."""
    missing = [name for name in ("safetensors", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(f"{' and '.join(missing)} not installed. Run `pip install 'rom-kernels[train]'`.")
    if args.dense and (args.num_experts or args.top_k):
        raise TrainingError("--dense means one expert; leave --num-experts and --top-k out.")
    if not 0 < args.validation < 1:
        raise TrainingError(f"--validation is a fraction between 0 and 1, got {args.validation:g}.")
    if args.sequence_length < 2:
        raise TrainingError("--sequence-length must be at least 2: one byte to read and one to predict.")
    if not args.steps and not args.minutes:
        args.minutes = DEFAULT_MINUTES

    import torch  # noqa: PLC0415 - these are slow, and help and wrong arguments need not wait

    from rom import memory  # noqa: PLC0415
    from rom.training import text_run  # noqa: PLC0415

    memory.keep_freed()
    if args.threads:
        torch.set_num_threads(args.threads)
    experts = {"num_experts": args.num_experts, "top_k": args.top_k}
    if args.dense:
        experts = {"num_experts": 1, "top_k": 1}
    return text_run.train(
        text_run.Options(
            text=args.text,
            errors=args.errors,
            validation=args.validation,
            preset=args.preset,
            experts={name: value for name, value in experts.items() if value is not None},
            out=args.out,
            resume=args.resume,
            steps=args.steps,
            minutes=args.minutes,
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
            learning_rate=args.lr,
            weight_decay=args.weight_decay,
            seed=args.seed,
            evaluate_every=args.eval_every,
            save_every=args.save_every,
            device=select_device(args.device),
        )
    )
