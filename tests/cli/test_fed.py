"""`rom fed`: a small study, killed halfway and resumed, and what a user can get wrong."""

import csv

import pytest

from rom.cli import main
from rom.models import fedfd

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
        (["--map", "spin"], "spin"),
    ],
)
def test_user_errors(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 2
    assert message in capsys.readouterr().err
