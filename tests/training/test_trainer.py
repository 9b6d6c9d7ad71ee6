"""The loop on a model it does not know: learning, logs, exact resumption, interruption, divergence."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training.small import same_tensors, small_trainer

from rom.training import checkpoint, report
from rom.training import trainer as trainer_module
from rom.training.errors import CheckpointError, TrainingError
from rom.training.trainer import Settings

SCRIPT = Path(__file__).with_name("small.py")


def test_learns_and_leaves_everything(tmp_path, capsys):
    trainer = small_trainer(tmp_path, steps=60)
    start = trainer.task.evaluate(trainer.model)["bits_per_byte"]
    progress = trainer.run()
    assert progress.step == 60 and progress.best < start - 1 and not trainer.interrupted
    records = report.read_log(tmp_path / report.LOG)
    assert [record["step"] for record in records if record["event"] == "evaluation"] == list(range(6, 61, 6))
    losses = [record["loss"] for record in records if record["event"] == "train"]
    assert losses[-1] < losses[0] - 1
    assert {"learning_rate", "gradient_norm", "rate", "seconds"} <= records[0].keys()
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / checkpoint.LAST).exists() and (tmp_path / checkpoint.PREVIOUS).exists()
    assert report.plot_loss(tmp_path, "bits_per_byte", ("n-gram", 2.0)).stat().st_size > 5000
    assert report.plot_load(tmp_path) is None
    assert "bytes/s  ETA" in capsys.readouterr().err


def test_schedule_reaches_its_ends(tmp_path):
    trainer = small_trainer(tmp_path, steps=100, log_every=1)
    trainer.run()
    rates = [record["learning_rate"] for record in report.read_log(tmp_path / report.LOG) if record["event"] == "train"]
    assert (
        rates[0] == pytest.approx(1e-2 / 3) and max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-3)
    )


def test_minutes_end_a_run_and_drive_the_schedule(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    trainer = small_trainer(tmp_path, minutes=1)
    trainer.run()
    assert 60 <= trainer.progress.seconds < 63
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3, rel=0.01)
    records = report.read_log(tmp_path / report.LOG)
    evaluations = [record for record in records if record["event"] == "evaluation"]
    assert records[-1] == evaluations[-1] and len(evaluations) == 10 and records[-1]["step"] == trainer.progress.step


def test_validation_is_the_mean_over_every_byte(tmp_path):
    task, model = small_trainer(tmp_path, steps=1).task, small_trainer(tmp_path, steps=1).model.eval()
    uniform = torch.zeros_like(model.embedding.weight)
    model.embedding.weight.data = uniform
    model.head.weight = model.embedding.weight
    assert task.evaluate(model)["bits_per_byte"] == pytest.approx(8)


def test_the_longest_context_is_the_plain_loss(tmp_path):
    trainer = small_trainer(tmp_path, steps=1)
    task, model = trainer.task, trainer.model.eval()
    task.window = task.stride = len(task.validation)
    tokens = torch.tensor(task.validation.tolist())[None]
    plain = model(tokens, labels=tokens).loss.item() / math.log(2)
    assert task.evaluate(model)["bits_per_byte"] == pytest.approx(plain, rel=1e-6)


def test_resumed_run_ends_in_the_same_weights(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    small_trainer(whole, steps=40, evaluate_every=8).run()

    first = small_trainer(parts, steps=40, evaluate_every=8)
    step = first._step

    def stop_at_21(fraction):
        step(fraction)
        if first.progress.step == 21:
            os.kill(os.getpid(), signal.SIGINT)

    first._step = stop_at_21
    first.run()
    assert first.interrupted and first.progress.step == 21
    second = small_trainer(parts, steps=40, evaluate_every=8)
    second.resume()
    assert second.progress.step == 21
    second.run()
    assert second.progress.step == 40
    # Identical but for the clock, which lies in the metadata.
    assert same_tensors(whole / checkpoint.LAST, parts / checkpoint.LAST)
    assert same_tensors(whole / "model.safetensors", parts / "model.safetensors")

    def evaluations(folder):
        return [
            (record["step"], record["bits_per_byte"])
            for record in report.read_log(folder / report.LOG)
            if record["event"] == "evaluation"
        ]

    assert evaluations(whole) == evaluations(parts)


def _script(*arguments):
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_run_ends_in_the_same_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert _script(whole, 120).wait() == 0
    process = _script(killed, 120, "--forever")
    while not (killed / checkpoint.PREVIOUS).exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert _script(killed, 120, "--resume").wait() == 0
    assert same_tensors(whole / checkpoint.LAST, killed / checkpoint.LAST)


@pytest.mark.slow
def test_second_interrupt_ends_at_once(tmp_path):
    process = _script(tmp_path, 100_000, "--forever")
    while not (tmp_path / checkpoint.LAST).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert checkpoint.load(tmp_path, warn=pytest.fail)[1]["step"] > 0


def test_interrupts_are_taken_once_and_given_back(tmp_path):
    trainer = small_trainer(tmp_path, steps=30)
    step = trainer._step

    def interrupted_twice(fraction):
        step(fraction)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not handler:  # another thread may get it, a moment later
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # which the second one ends

    trainer._step = interrupted_twice
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_resume_refuses_another_run(tmp_path):
    small_trainer(tmp_path, steps=4).run()
    other = small_trainer(tmp_path, seed=1, steps=4)
    with pytest.raises(CheckpointError, match=r"of another run: seed differ\. Resume with the arguments"):
        other.resume()


def test_divergence_is_an_error_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = small_trainer(tmp_path, steps=40, evaluate_every=10)
    step = trainer._step

    def poison(fraction):
        if trainer.progress.step == 24:
            trainer.model.embedding.weight.data.fill_(float("nan"))
        step(fraction)

    trainer._step = poison
    with pytest.raises(
        TrainingError, match=r"the loss is nan before step 25: training diverged\. Lower the learning rate"
    ):
        trainer.run()
    tensors, state = checkpoint.load(tmp_path, warn=pytest.fail)
    assert state["step"] == 20 and all(
        torch.isfinite(tensor).all() for name, tensor in tensors.items() if "model" in name
    )


def test_log_of_a_killed_run_is_cut_at_the_checkpoint(tmp_path):
    reporter = report.Reporter(tmp_path, "bytes")
    for step in (5, 10, 15):
        reporter.record("train", step=step)
    with (tmp_path / report.LOG).open("a") as log:
        log.write('{"event": "tra')
    reporter.rewind(10)
    assert [json.loads(line)["step"] for line in (tmp_path / report.LOG).read_text().splitlines()] == [5, 10]


def test_load_plot(tmp_path):
    reporter = report.Reporter(tmp_path, "bytes")
    for step in range(1, 6):
        reporter.record("train", step=step, load=[[0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.3, 0.7], [0.6, 0.4]])
    assert report.plot_load(tmp_path).stat().st_size > 5000


@pytest.mark.parametrize(
    ("values", "message"), [({}, "steps, minutes or both, got neither"), ({"steps": 0}, "steps > 0, got 0")]
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_best_model_is_kept(tmp_path):
    trainer = small_trainer(tmp_path, steps=3, evaluate_every=1)
    values = iter([3.0, 2.0, 2.5])
    trainer.task.evaluate = lambda model: {"bits_per_byte": next(values)}
    saved = []
    trainer.task.save = lambda model, folder: saved.append(trainer.progress.step)
    assert trainer.run().best_step == 2 and saved == [1, 2]
    assert load_file(tmp_path / checkpoint.LAST)["model.seen"].item() == 3 * 4 * 24
