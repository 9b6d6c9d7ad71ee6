"""`rom fed`: a small study, killed halfway and resumed, and what a user can get wrong."""

import csv
import importlib.util

import pytest

from rom.cli import main
from rom.models import fedfd
from rom.models.fedfd import study

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")

SMALL = ["--groups", "mlp,cnn", "--clients", "4", "--rounds", "2", "--local-epochs", "1", "--seeds", "2"]
SMALL += ["--methods", "fedavg,fedfd"]


def run(out, *more):
    return main(["fed", "--out", str(out), *SMALL, *more])


def test_a_study_and_its_files(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "| fedfd |" in out and "| pooled |" in out and " ± " in out
    assert (tmp_path / "table.md").read_text().strip() == out.strip()
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    with open(tmp_path / "rounds.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 * 2 + 1)  # seeds × (methods × rounds + pooled)
    assert run(tmp_path) == 2 and "holds a run already" in capsys.readouterr().err


def test_a_killed_study_resumes_to_the_same_figures(tmp_path, monkeypatch):
    assert run(tmp_path / "whole") == 0
    rounds, finish = [], fedfd.Federation.finish_round

    def killed(self, updates, refused=None):
        rounds.append(self.round)
        if len(rounds) == 4:
            raise KeyboardInterrupt
        return finish(self, updates, refused)

    with monkeypatch.context() as patch:
        patch.setattr(fedfd.Federation, "finish_round", killed)
        assert run(tmp_path / "cut") == 130
    assert run(tmp_path / "cut", "--resume") == 0
    assert (tmp_path / "cut" / "rounds.csv").read_text() == (tmp_path / "whole" / "rounds.csv").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--groups", "lenet"], "expected ARCHITECTURE"),
        (["--groups", "mlp,mlp"], "different groups"),
        (["--methods", "magic"], "expected methods of"),
        (["--clients", "2000"], "1 to 584 clients"),
    ],
)
def test_user_errors(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 2
    assert message in capsys.readouterr().err


def test_flower_is_an_extra(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in {"flwr", "ray"} else find(name))
    assert run(tmp_path, "--engine", "flower") == 2
    assert "flwr, ray not installed. Run `pip install 'rom-kernels[fed]'`" in capsys.readouterr().err


def test_differences_are_taken_seed_by_seed():
    accuracies = {"fedavg": (0.5, 0.7), "fedfd": (0.6, 0.9), "pooled": (0.9, 1.0)}
    rows = [
        {"method": method, "seed": seed, "round": number, "global": value * (number + 1) / 2, "mean of groups": 0.5}
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
        for number in range(2)
    ]
    fedavg, fedfd, _ = study.table(rows).splitlines()[2:]
    assert fedavg == "| fedavg | 0.600 ± 1.271 |  | 0.500 ± 0.000 | 2 |"
    assert fedfd == "| fedfd | 0.750 ± 1.906 | +0.150 ± 0.635 | 0.500 ± 0.000 | 2 |"  # t(0.975, 1) = 12.71
