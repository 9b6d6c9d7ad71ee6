"""What `rom train` does: a Routing Mamba on the bytes of some text, from the files to the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rom.models import RoutingMambaConfig, RoutingMambaLM
from rom.training import checkpoint, report
from rom.training.data import (
    VOCABULARY,
    Corpus,
    UndecodableText,
    WindowBatches,
    python_reference,
    read_corpus,
    require_length,
)
from rom.training.errors import TrainingError
from rom.training.language import LanguageModelling
from rom.training.ngram import ngram_bits_per_byte
from rom.training.trainer import Progress, Settings, Trainer

NGRAM_ORDER = 4
NGRAM_NAME = f"order-{NGRAM_ORDER} n-gram"
NGRAM_BYTES = 1 << 26  # counted at most: that takes about 60 bytes of memory per byte of text
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What the command line says; `rom train --help` explains each. No text means Python's language reference."""

    text: Sequence[str] | None
    errors: UndecodableText
    validation: float
    preset: str
    experts: Mapping[str, int]
    out: Path
    resume: bool
    steps: int | None
    minutes: float | None
    batch_size: int
    sequence_length: int
    learning_rate: float
    weight_decay: float
    seed: int
    evaluate_every: int | None
    save_every: int | None
    device: str


def train(options: Options) -> int:
    """Trains, leaves everything in `options.out` and prints the verdict; returns the exit code.

    Raises:
        TrainingError: the options, the text or a checkpoint cannot be used.
    """
    config = _config(options)
    corpus = read_corpus(options.text, options.errors) if options.text else python_reference()
    training, validation = corpus.split(options.validation)
    require_length(training, validation, options.sequence_length)
    _prepare_folder(options.out, options.resume)
    _describe(corpus, len(training), len(validation))
    baseline = ngram_bits_per_byte(training[-NGRAM_BYTES:], validation, NGRAM_ORDER)
    print(f"{NGRAM_NAME} (Witten–Bell): {baseline:.4f} bits per byte on the same split")

    torch.manual_seed(options.seed)
    model = RoutingMambaLM(config, device=options.device)
    active = f", {model.num_parameters(active=True):,} of them active per byte" if config.num_experts > 1 else ""
    print(f"model: {options.preset}, {model.num_parameters():,} parameters{active}", flush=True)

    trainer = _trainer(options, model, corpus, training, validation)
    if checkpoint.exists(options.out):
        trainer.resume()
        print(f"resumed at step {trainer.progress.step}", flush=True)
    elif options.resume:
        print(f"no checkpoint in {options.out} yet: starting at step 0", flush=True)
    progress = trainer.run()
    report.plot_loss(options.out, trainer.task.criterion, (NGRAM_NAME, baseline))
    report.plot_load(options.out)
    if trainer.interrupted:
        print(f"interrupted: step {progress.step} is saved in {options.out}; the same command with --resume goes on.")
    if progress.best_step:
        print(_verdict(progress, baseline))
        print(
            f'in {options.out}: the best model, log and plots. Next: rom generate --model {options.out} --prompt "The "'
        )
    return INTERRUPTED if trainer.interrupted else 0


def _config(options: Options) -> RoutingMambaConfig:
    try:
        config = RoutingMambaConfig.preset(options.preset, vocab_size=VOCABULARY, **options.experts)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if config.top_k > config.num_experts:
        raise TrainingError(f"--top-k {config.top_k} is more than the {config.num_experts} experts there are.")
    return config


def _prepare_folder(folder: Path, resume: bool) -> None:
    started = checkpoint.exists(folder)
    if started and not resume:
        raise TrainingError(f"{folder} holds a run already. Continue it with --resume, or give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not started:
            (folder / report.LOG).write_text("")  # also shows that the folder can be written to
    except OSError as error:
        raise TrainingError(f"cannot write to {folder} ({error.strerror}). Give another --out.") from error


def _describe(corpus: Corpus, training: int, validation: int) -> None:
    print(f"text: {corpus.name}, {corpus.files} files, {training:,} bytes to train on, {validation:,} to validate")
    if corpus.skipped:
        print(f"left out, not UTF-8: {', '.join(map(str, corpus.skipped))}")
    if training > NGRAM_BYTES:
        print(f"the n-gram counts the last {NGRAM_BYTES:,} bytes of the training part only")


def _trainer(
    options: Options, model: RoutingMambaLM, corpus: Corpus, training: np.ndarray, validation: np.ndarray
) -> Trainer:
    length = options.sequence_length
    batches = WindowBatches(training, options.batch_size, length, options.seed)
    task = LanguageModelling(batches, validation, window=2 * length, batch_size=options.batch_size)
    settings = Settings(
        steps=options.steps,
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        evaluate_every=options.evaluate_every,
        save_every=options.save_every,
    )
    fixed = ("validation", "batch_size", "sequence_length", "learning_rate", "weight_decay", "seed")
    identity = {
        "model": model.config.to_dict(),
        "text": corpus.digest,
        **{name: getattr(options, name) for name in fixed},
    }
    return Trainer(model, task, settings, options.out, report.Reporter(options.out, task.unit), identity)


def _verdict(progress: Progress, baseline: float) -> str:
    compared = "beats" if progress.best < baseline else "does not beat"
    return (
        f"best validation: {progress.best:.4f} bits per byte at step {progress.best_step} of {progress.step} "
        f"(the last: {progress.latest:.4f}): {compared} the {NGRAM_NAME}'s {baseline:.4f}"
    )
