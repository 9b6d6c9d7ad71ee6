"""The study on a few thousand bytes: runs, resumes, and reports both models."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rom.training.data import python_reference

SCRIPT = Path(__file__).parents[2] / "examples" / "dense_vs_routed.py"


def test_interval_is_student_s():
    mean, half = runpy.run_path(str(SCRIPT))["mean_and_interval"]([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-6)


@pytest.mark.slow
def test_study(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(python_reference().tokens[:6000].tobytes())
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "study"), "--seeds", "2", "--steps", "4", "--"]
    command += ["--text", str(text), "--batch-size", "2", "--sequence-length", "32"]
    for _ in range(2):  # the second time everything is there
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert "| routed | " in result.stdout and "| dense | " in result.stdout and "paired by seed" in result.stdout
    assert (tmp_path / "study" / "dense_vs_routed.png").stat().st_size > 5000
    assert len((tmp_path / "study" / "dense_vs_routed.csv").read_text().splitlines()) > 8
    assert (tmp_path / "study" / "dense_vs_routed.md").read_text().strip() in result.stdout
