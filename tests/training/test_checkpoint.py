"""Checkpoints: complete, atomic, and a damaged one is noticed."""

import os
import resource
import signal

import pytest
import torch
from training.small import SmallModel, small_trainer

from rom.training import checkpoint
from rom.training.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    trainer = small_trainer(tmp_path, steps=4, evaluate_every=2)
    trainer.run()
    return tmp_path


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "flipped":
        content[-100] ^= 1
    else:
        content[:] = b"not a checkpoint at all"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "foreign"])
def test_damaged_checkpoint_falls_back_to_the_previous(run, how):
    damage(run / checkpoint.LAST, how)
    warnings = []
    _, state = checkpoint.load(run, warnings.append)
    assert state["step"] == 2
    assert "checkpoint.safetensors is damaged" in warnings[0]
    assert "Falling back to checkpoint.previous.safetensors, step 2." in warnings[0]


def test_no_intact_checkpoint_is_an_error(run):
    damage(run / checkpoint.LAST, "truncated")
    damage(run / checkpoint.PREVIOUS, "flipped")
    with pytest.raises(CheckpointError, match=r"damaged.*damaged.*No intact checkpoint is left: start anew"):
        checkpoint.load(run, pytest.fail)


def test_no_checkpoint_is_an_error(tmp_path):
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path, pytest.fail)


def test_killed_between_the_renames(run):
    os.replace(run / checkpoint.LAST, run / checkpoint.PREVIOUS)
    (run / "checkpoint.safetensors.partial").write_bytes(b"half")
    assert checkpoint.load(run, pytest.fail)[1]["step"] == 4


def test_disk_full_leaves_the_last_checkpoint(run):
    trainer = small_trainer(run, steps=4)
    trainer.resume()
    before = (run / checkpoint.LAST).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails with EFBIG, as ENOSPC would
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .* is untouched"):
            trainer._save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (run / checkpoint.LAST).read_bytes() == before
    assert not (run / "checkpoint.safetensors.partial").exists()


def test_another_model_is_refused(run):
    tensors, _ = checkpoint.load(run, pytest.fail)
    model = SmallModel(width=8)
    with pytest.raises(CheckpointError, match="is of another model"):
        checkpoint.restore(run, model, torch.optim.AdamW(model.parameters()), tensors)


def test_random_generator_is_restored(run):
    trainer = small_trainer(run, steps=4)
    trainer.resume()
    first = torch.rand(3)
    trainer.resume()
    assert torch.rand(3).equal(first)
