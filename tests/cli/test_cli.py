"""The commands end to end: a short run on real text, and every error a user can make."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rom.cli import main
from rom.cli.generate import ByteStreamer
from rom.training import checkpoint
from rom.training.data import python_reference

ROM = shutil.which("rom", path=Path(sys.executable).parent) or "rom"
# One thread: on a busy machine two wait for each other most of the time.
SHORT = ["--batch-size", "4", "--sequence-length", "48", "--lr", "5e-3", "--threads", "1"]


def rom(*arguments):
    return subprocess.run([ROM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "reference.txt"
    file.write_bytes(python_reference().tokens[:6000].tobytes())
    return file


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    result = rom("train", "--text", text, "--steps", 20, "--out", out, "--eval-every", 10, *SHORT)
    assert result.returncode == 0, result.stderr
    return out, result


def fails(capsys, message, *arguments):
    """The command ends with code 2 and says this, without a traceback."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err, err


def test_training_learns_and_leaves_everything(trained):
    out, result = trained
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "train"]
    bits = [record["bits_per_byte"] for record in records if record["event"] == "evaluation"]
    assert losses[-1] < losses[0] and len(bits) == 2 and bits[-1] < 8
    load = next(record["load"] for record in records if "load" in record)
    assert len(load) == 4 and all(sum(layer) == pytest.approx(1) for layer in load)
    for name in ("config.json", "model.safetensors", "checkpoint.safetensors", "loss.png", "experts.png"):
        assert (out / name).stat().st_size > 100, name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "order-4 n-gram (Witten–Bell): " in result.stdout
    assert "5,400 bytes to train on, 600 to validate" in result.stdout
    assert f"best validation: {min(bits):.4f} bits per byte" in result.stdout and "does not beat" in result.stdout
    assert "validation: bits per byte" in result.stderr and "Traceback" not in result.stderr


def runs(capsys, *arguments):
    """The command in this process, which spares the imports: what it printed on both streams."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_generation(trained, capsys):
    arguments = ["generate", "--model", trained[0], "--prompt", "Für ", "--max-new-tokens", 30, "--threads", 1]
    first, _ = runs(capsys, *arguments, "--seed", 1)
    assert first.startswith("Für ") and len(first) > len("Für \n")
    assert runs(capsys, *arguments, "--seed", 1)[0] == first != runs(capsys, *arguments, "--seed", 2)[0]
    greedy, _ = runs(capsys, *arguments, "--greedy")
    assert greedy.startswith("Für ") and runs(capsys, *arguments, "--greedy")[0] == greedy


def test_resume_reaches_the_same_weights(trained, text, tmp_path, capsys):
    whole, _ = trained
    arguments = ["train", "--text", text, "--out", tmp_path, "--steps", 20, "--eval-every", 10, *SHORT, "--resume"]
    out, _ = runs(capsys, *arguments, "--save-every", 7)
    assert "no checkpoint in" in out
    # As after a crash while the last one was written.
    content = (tmp_path / checkpoint.LAST).read_bytes()
    (tmp_path / checkpoint.LAST).write_bytes(content[:-1000])
    out, err = runs(capsys, *arguments)
    assert "resumed at step 14" in out
    assert "is damaged" in err and "Falling back to checkpoint.previous.safetensors, step 14" in err
    a, _ = checkpoint.load(whole, pytest.fail)
    b, _ = checkpoint.load(tmp_path, pytest.fail)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_dense_twin(text, tmp_path, capsys):
    runs(capsys, "train", "--text", text, "--steps", 1, "--out", tmp_path, "--dense", *SHORT)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 1
    assert not (tmp_path / "experts.png").exists()


def test_resuming_another_run_is_refused(trained, text, capsys):
    out, _ = trained
    again = ["train", "--text", text, "--steps", 20, "--out", out]
    fails(capsys, "holds a run already. Continue it with --resume", *again, *SHORT)
    fails(
        capsys,
        "of another run: model, batch_size, sequence_length, learning_rate differ",
        *again,
        "--resume",
        "--num-experts",
        2,
    )


def test_damaged_checkpoints_are_an_error(trained, text, tmp_path, capsys):
    (tmp_path / checkpoint.LAST).write_bytes((trained[0] / checkpoint.LAST).read_bytes()[:5000])
    arguments = ["train", "--text", text, "--steps", 20, "--out", tmp_path, "--resume", *SHORT]
    fails(capsys, "No intact checkpoint is left: start anew in another folder", *arguments)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "input.txt does not exist."),
        (b"", [], "no text in"),
        (b"abc\xff" * 1000, [], "input.txt is not UTF-8 text: byte 3 (0xff) cannot be decoded"),
        (b"abc\xff" * 1000, ["--errors", "skip"], "(1 files that are not UTF-8 were left out)"),
        (b"abc" * 100, [], "the text is too short: 300 bytes, of which 270 are for training"),
        (b"abc" * 1000, ["--validation", "1.5"], "--validation is a fraction between 0 and 1, got 1.5"),
        (b"abc" * 1000, ["--preset", "huge"], "expected one of tiny, 115m, 353m, 765m, 1.3b, got 'huge'"),
        (b"abc" * 1000, ["--top-k", "9"], "--top-k 9 is more than the 4 experts there are"),
        (b"abc" * 1000, ["--dense", "--top-k", "2"], "--dense means one expert"),
        (b"abc" * 1000, ["--sequence-length", "1"], "--sequence-length must be at least 2"),
        (b"abc" * 1000, ["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (b"abc" * 1000, ["--minutes", "nan"], "argument --minutes: expected a number above 0, got 'nan'"),
        (b"abc" * 1000, ["--lr", "fast"], "argument --lr: expected a number above 0, got 'fast'"),
        (b"abc" * 1000, ["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (b"abc" * 1000, ["--weight-decay", "-1"], "argument --weight-decay: expected a number of at least 0, got '-1'"),
        (b"abc" * 1000, ["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_train_errors(content, arguments, message, tmp_path, capsys):
    file = tmp_path / "input.txt"
    if content is not None:
        file.write_bytes(content)
    fails(capsys, message, "train", "--text", file, "--out", tmp_path / "out", "--steps", 1, *arguments)


def test_output_that_cannot_be_written(text, capsys):
    fails(capsys, "cannot write to /dev/null/run", "train", "--text", text, "--steps", 1, "--out", "/dev/null/run")


def test_generate_errors(trained, tmp_path, capsys):
    out, _ = trained
    fails(capsys, f"cannot load a model from {tmp_path}", "generate", "--model", tmp_path)
    fails(capsys, "--prompt is empty", "generate", "--model", out, "--prompt", "")
    fails(capsys, "top_p", "generate", "--model", out, "--prompt", "a", "--top-p", "-1")
    shutil.copy(out / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:5000])
    fails(capsys, "model.safetensors", "generate", "--model", tmp_path)


def test_no_command_is_an_error(capsys):
    fails(capsys, "the following arguments are required: COMMAND")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    assert {"train", "generate"} <= set(capsys.readouterr().out.split())


def test_any_bytes_can_be_printed(capsys):
    streamer = ByteStreamer()
    for byte in [*range(256), *"grün€".encode(), 0xE2, 0x82]:
        streamer.put(torch.tensor([byte]))
    streamer.end()
    out = capsys.readouterr().out
    assert "grün€\N{REPLACEMENT CHARACTER}\n" in out


def test_closed_pipe_is_no_error(trained):
    command = f"'{ROM}' generate --model '{trained[0]}' --max-new-tokens 40 --threads 1 | head -c 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, check=False, timeout=60, env=os.environ)
    assert b"Traceback" not in result.stderr and b"BrokenPipe" not in result.stderr
