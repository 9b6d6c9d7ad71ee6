"""The study on a few images: runs, resumes, refuses other settings, reports every head."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
SCRIPT = Path(__file__).parents[2] / "examples" / "text_guided_ablation.py"


def test_improvement_is_a_geometric_mean():
    improvement = runpy.run_path(str(SCRIPT))["improvement"]
    ratio, low, high = improvement(np.array([2.0, 8.0]), np.array([1.0, 1.0]))
    assert ratio == pytest.approx(4) and low * high == pytest.approx(16) and low < 1 < high
    assert all(np.isnan(improvement(np.array([1.0, 1.0]), np.array([1.0, 0.0]))))


@pytest.mark.slow
def test_study(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--trunk", "mlp", "--width", "32", "--out", str(tmp_path)]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "seed 0" not in done.stdout and done.stdout.count("| no norm, random | ") == 3
    assert (tmp_path / "text_guided_ablation.png").stat().st_size > 20_000
    assert (tmp_path / "text_guided_ablation.md").read_text().strip() in done.stdout
    assert len((tmp_path / "text_guided_ablation.csv").read_text().splitlines()) == 1 + 2 * (2 * 5 + 5 * 6)
    done = subprocess.run([*command, "--width", "64"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "other settings" in done.stderr
