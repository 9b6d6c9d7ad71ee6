"""`rom campaign`: the whole way on a model of one's own, the example, and what a user can get wrong."""

import csv
import os
import signal
import sys

import pytest
import torch

from rom import campaign, faults
from rom.campaign import Store
from rom.cli import main

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.first(x).relu())

def net():
    torch.manual_seed(1)
    return Net()

def images():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
    return x, net()(x).argmax(1)

def nothing():
    return None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a model of one's own, and the arguments that name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    return ["run", "--model", "nets.py:net", "--data", "nets:images", "--threads", "1"]


def rom(*arguments):
    try:
        return main(["campaign", *map(str, arguments)])
    except SystemExit as exit:  # argparse
        return exit.code


def test_the_whole_way(mine, capsys):
    settings = [*mine, "--faults", "96", "--by", "layer", "--bits", "exponent", "--targets", "output,weight,bias"]
    assert rom(*settings, "--out", "c.sqlite") == 0
    out = capsys.readouterr().out
    assert "96 faults (stratified) of " in out and "in 2 layers, 10 inputs → c.sqlite" in out
    assert "c.sqlite: 96 of 96 faults (100%)" in out and "without faults: accuracy 1.0000" in out
    assert "next: rom campaign report c.sqlite" in out
    results = campaign.read("c.sqlite")
    assert results.complete and results.plan.counts == (16,) * 6 and results.plan.strata[0].bits == tuple(range(23, 31))
    assert rom("status", "c.sqlite") == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[4:10]]
    assert rows == [[layer, target, "16"] for layer in ("first", "head") for target in ("output", "weight", "bias")]
    assert rom("export", "c.sqlite", "c.csv") == 0
    with open("c.csv") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["first"] * 48 + ["head"] * 48
    # Resumed with a longer sample, and not by accident.
    assert rom(*settings, "--out", "c.sqlite") == 2 and "holds a campaign already" in capsys.readouterr().err
    settings[settings.index("96")] = "120"
    assert rom(*settings, "--out", "c.sqlite", "--resume") == 0
    assert campaign.read("c.sqlite").plan.counts == (20,) * 6


def test_shards(mine, capsys):
    settings = [*mine, "--faults", "200", "--by", "all", "--block-size", "16"]
    for i in range(3):
        assert rom(*settings, "--out", f"{i}.sqlite", "--shard", f"{i}/3") == 0
    assert rom("merge", *(f"{i}.sqlite" for i in range(3)), "--out", "all.sqlite") == 0
    out = capsys.readouterr().out
    assert "shard 0/3 is complete: 72 faults" in out and "200 faults added" in out
    assert rom(*settings, "--out", "one.sqlite") == 0
    assert campaign.read("all.sqlite").table.tobytes() == campaign.read("one.sqlite").table.tobytes()


def test_plans_and_clamps(mine):
    assert rom(*mine, "--faults", "all", "--layers", "head", "--bits", "29-30,31", "--targets", "output",
               "--by", "layer", "--clamp", "zero", "--out", "all.sqlite") == 0  # fmt: skip
    results = campaign.read("all.sqlite")
    assert results.plan.scheme == "exhaustive" and len(results.table) == 10 * 3 * 3
    assert set(results.identity["bounds"]) == {"first", "head"} and results.identity["nan_to"] == "zero"
    assert not results.table["due"].any()  # clamped
    faults.FaultPlan.simple(results.plan.strata, 20, seed=1).save("plan.rom")
    assert rom(*mine, "--plan", "plan.rom", "--out", "c.sqlite", "--stop-at", "0.9", "--block-size", "5") == 0
    assert campaign.read("c.sqlite").plan.scheme == "simple"


def test_ctrl_c(mine, capsys, monkeypatch):
    add = Store.add

    def interrupted(*given):
        add(*given)
        os.kill(os.getpid(), signal.SIGINT)

    settings = [*mine, "--faults", "64", "--by", "all", "--block-size", "16", "--out", "c.sqlite"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", interrupted)
        assert rom(*settings) == 130
    assert "interrupted: 16 of 64 faults are stored; the same command with --resume" in capsys.readouterr().out
    assert rom(*settings, "--resume") == 0 and campaign.read("c.sqlite").complete


def test_the_example(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    from rom.campaign import digits

    monkeypatch.setattr(digits, "EPOCHS", 2)
    out = tmp_path / "digits.sqlite"
    settings = ["--faults", "32", "--bits", "20,30", "--targets", "output", "--layers", "conv2,fc", "--threads", "1"]
    assert rom("run", "--example", "digits", "--out", out, *settings) == 0
    assert "of 32 faults (100%)" in capsys.readouterr().out
    results = campaign.read(out)
    assert results.golden["samples"] == 359 and results.golden["accuracy"] > 0.8
    kept = digits.trained(tmp_path)
    assert faults.model_fingerprint(kept) == results.identity["model"] and not kept.training


@pytest.mark.slow
def test_the_example_in_full(tmp_path, capsys):
    pytest.importorskip("sklearn")
    from rom.campaign import digits

    out = tmp_path / "digits.sqlite"
    assert rom("run", "--example", "digits", "--out", out) == 0
    results = campaign.read(out)
    assert results.complete and len(results.table) == 9600 and len(results.plan.strata) == 3 * 2 * 32
    assert results.golden["accuracy"] > 0.97
    kept = digits.trained(tmp_path)
    (tmp_path / "digits-cnn.pt").unlink()
    assert all(map(torch.equal, kept.parameters(), digits.trained(tmp_path).parameters()))  # trained anew: the same


@pytest.mark.parametrize(
    "more, message",
    [
        (["--example", "digits"], "give --example digits, or --model and --data"),
        (["--faults", "0"], "expected a number of at least 1, or all, got '0'"),
        (["--faults", "many"], "or all, got 'many'"),
        (["--faults", "5"], "less than one for each of the 128 strata"),
        ([], "give --faults N (or all), or a --plan"),
        (["--faults", "9", "--by", "all", "--targets", "outputs"], "--targets: expected some of input, weight"),
        (["--faults", "9", "--by", "all", "--layers", "tail"], "a layer of 'first', 'relu', 'head', got 'tail'"),
        (["--faults", "9", "--by", "all", "--bits", "32"], "positions of 0 to 31"),
        (["--faults", "9", "--by", "all", "--bits", "3-x"], "positions as 23-30,31, got '3-x'"),
        (["--faults", "9", "--by", "all", "--bits", "big"], "got 'big'"),
        (["--faults", "9", "--by", "all", "--shard", "3/3"], "--shard is I/N with I from 0 to N - 1"),
        (["--faults", "9", "--by", "all", "--shard", "0/3", "--stop-at", "0.1"], "expected shard without stop"),
        (["--faults", "9", "--by", "all", "--out", "no/c.sqlite"], "there is no folder no for --out"),
        (["--faults", "9", "--by", "all", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["--plan", "nets.py"], "nets.py is not a fault plan"),
        (["--plan", "none.rom"], "none.rom"),
        (["--faults", "9", "--model", "nets.py"], "expected MODULE:FUNCTION, such as nets.py:resnet"),
        (["--faults", "9", "--model", "cats.py:net"], "there is no file cats.py"),
        (["--faults", "9", "--model", "cats:net"], "cats cannot be imported (No module named 'cats')"),
        (["--faults", "9", "--model", "nets:cat"], "nets has no function 'cat'; it has Net, images, net, nothing"),
        (["--faults", "9", "--model", "nets:nothing"], "expected a torch.nn.Module, got NoneType"),
        (["--faults", "9", "--data", "nets:nothing"], "expected two tensors, inputs and labels, got NoneType"),
    ],
)  # fmt: skip
def test_user_errors(mine, capsys, more, message):
    assert rom(*mine, "--out", "c.sqlite", *more) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not os.path.exists("c.sqlite")


def test_errors_of_other_actions(mine, capsys):
    for arguments, message in [
        (["status", "none.sqlite"], "there is no campaign at none.sqlite"),
        (["status", "nets.py"], "nets.py"),
        (["merge", "none.sqlite", "--out", "c.sqlite"], "there is no campaign at none.sqlite"),
        (["run", "--model", "nets:net", "--out", "c"], "--model needs --data"),
        (["run", "--data", "nets:images", "--out", "c"], "--data needs --model"),
        (["run", "--faults", "3", "--out", "c"], "give --example digits, or --model and --data"),
        ([], "required: ACTION"),
    ]:
        assert rom(*arguments) == 2 and message in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert rom("run", "--help") == 0
    assert "rom campaign run --example digits --out digits.sqlite" in capsys.readouterr().out
