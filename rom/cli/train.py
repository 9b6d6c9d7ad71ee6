"""Train a Routing Mamba on text, byte by byte, and compare it with an n-gram.

Without --text it learns the language reference inside Python, so it needs no download. The first 90 % of the bytes are
trained on and the rest validates, in one piece each. In DIR it leaves config.json and model.safetensors (the best model
by validation), checkpoint.safetensors (the last state, for --resume) and the one before it, log.jsonl, loss.png and
experts.png. Ctrl-C saves and stops; a second one stops at once. Runs given in --steps are reproducible bit for bit on
one machine, killed and resumed or not.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from rom.cli.options import positive_float, positive_int, select_device
from rom.training.errors import TrainingError

if TYPE_CHECKING:
    from rom.models import RoutingMambaConfig
    from rom.training.data import Corpus
    from rom.training.trainer import Progress

NGRAM_ORDER = 4
NGRAM_BYTES = 1 << 26  # counting takes about 60 bytes of memory per byte of text
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
    run.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (default 0.1)")
    run.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    run.add_argument("--eval-every", type=positive_int, metavar="N", help="steps (default: ten times in the run)")
    run.add_argument("--save-every", type=positive_int, metavar="N", help="steps between further checkpoints")
    run.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    run.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Trains; 0, or 130 when interrupted."""
    _require_extra()
    import torch  # noqa: PLC0415 - below: slow imports, which help and argument errors need not wait for

    from rom.models import RoutingMambaLM  # noqa: PLC0415
    from rom.training import data, ngram  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    device = select_device(args.device)
    config = _config(args)
    corpus = data.read_corpus(args.text, args.errors) if args.text else data.python_reference()
    train, validation = _split(args, corpus)
    _prepare_folder(args.out, args.resume)

    print(
        f"text: {corpus.name}, {corpus.files} files, {len(train):,} bytes to train on, {len(validation):,} to validate"
    )
    if corpus.skipped:
        print(f"left out, not UTF-8: {', '.join(map(str, corpus.skipped))}")
    baseline = ngram.ngram_bits_per_byte(train[-NGRAM_BYTES:], validation, NGRAM_ORDER)
    print(f"order-{NGRAM_ORDER} n-gram (Witten–Bell): {baseline:.4f} bits per byte on the same split")
    torch.manual_seed(args.seed)
    model = RoutingMambaLM(config, device=device)
    active = f", {model.num_parameters(active=True):,} of them active per byte" if config.num_experts > 1 else ""
    print(f"model: {args.preset}, {model.num_parameters():,} parameters{active}", flush=True)

    progress, interrupted = _train(args, model, train, validation, corpus, baseline)
    _conclude(args.out, progress, baseline, interrupted)
    return 130 if interrupted else 0


def _require_extra() -> None:
    missing = [name for name in ("safetensors", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(f"{' and '.join(missing)} not installed. Run `pip install 'rom-kernels[train]'`.")


def _config(args: argparse.Namespace) -> RoutingMambaConfig:
    from rom.models import RoutingMambaConfig  # noqa: PLC0415
    from rom.training.data import VOCABULARY  # noqa: PLC0415

    changes = {"num_experts": args.num_experts, "top_k": args.top_k}
    if args.dense:
        if args.num_experts or args.top_k:
            raise TrainingError("--dense means one expert; leave --num-experts and --top-k out.")
        changes = {"num_experts": 1, "top_k": 1}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        config = RoutingMambaConfig.preset(args.preset, vocab_size=VOCABULARY, **changes)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if config.top_k > config.num_experts:
        raise TrainingError(f"--top-k {config.top_k} is more than the {config.num_experts} experts there are.")
    return config


def _split(args: argparse.Namespace, corpus: Corpus):  # type: ignore[no-untyped-def]
    from rom.training import data  # noqa: PLC0415

    if not 0 < args.validation < 1:
        raise TrainingError(f"--validation is a fraction between 0 and 1, got {args.validation:g}.")
    if args.sequence_length < 2:
        raise TrainingError("--sequence-length must be at least 2: one byte to read and one to predict.")
    train, validation = corpus.split(args.validation)
    data.require_length(train, validation, args.sequence_length)
    return train, validation


def _prepare_folder(folder: Path, resume: bool) -> None:
    from rom.training import checkpoint, report  # noqa: PLC0415

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and not checkpoint.exists(folder):
            (folder / report.LOG).write_text("")  # also shows that the folder can be written to
    except OSError as error:
        raise TrainingError(f"cannot write to {folder} ({error.strerror}). Give another --out.") from error
    if not resume and checkpoint.exists(folder):
        raise TrainingError(f"{folder} holds a run already. Continue it with --resume, or give another --out.")


def _train(args, model, train, validation, corpus, baseline) -> tuple[Progress, bool]:  # type: ignore[no-untyped-def]
    from rom.training import checkpoint, data, language, report, trainer  # noqa: PLC0415

    length = args.sequence_length
    batches = data.WindowBatches(train, args.batch_size, length, args.seed)
    task = language.LanguageModelling(batches, validation, window=2 * length, batch_size=args.batch_size)
    minutes = args.minutes if args.minutes or args.steps else DEFAULT_MINUTES
    settings = trainer.Settings(
        steps=args.steps,
        minutes=minutes,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        evaluate_every=args.eval_every,
        save_every=args.save_every,
    )
    identity = {
        "model": model.config.to_dict(),
        "text": corpus.digest,
        **{
            name: getattr(args, name)
            for name in ("validation", "batch_size", "sequence_length", "lr", "weight_decay", "seed")
        },
    }
    reporter = report.Reporter(args.out, task.unit)
    loop = trainer.Trainer(model, task, settings, args.out, reporter, identity)
    if args.resume and checkpoint.exists(args.out):
        loop.resume()
        print(f"resumed at step {loop.progress.step}", flush=True)
    elif args.resume:
        print(f"no checkpoint in {args.out} yet: starting at step 0", flush=True)
    progress = loop.run()
    report.plot_loss(args.out, task.criterion, (f"order-{NGRAM_ORDER} n-gram", baseline))
    report.plot_load(args.out)
    return progress, loop.interrupted


def _conclude(folder: Path, progress: Progress, baseline: float, interrupted: bool) -> None:
    if interrupted:
        print(f"interrupted: step {progress.step} is saved in {folder}; the same command with --resume goes on.")
    if progress.best_step:
        verdict = "beats" if progress.best < baseline else "does not beat"
        print(
            f"best validation: {progress.best:.4f} bits per byte at step {progress.best_step} of {progress.step}: "
            f"{verdict} the order-{NGRAM_ORDER} n-gram's {baseline:.4f}"
        )
        print(
            f'in {folder}: the best model, checkpoint, log, plots. Next: rom generate --model {folder} --prompt "The "'
        )
