"""The GPU report's logic, without a GPU: what is skipped, cut off, kept and taken up again."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate")
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the report adds to it


@pytest.fixture
def report():
    return importlib.import_module("gpu_report")


@pytest.fixture
def steps():
    return importlib.import_module("steps")


@pytest.fixture
def journal(steps, tmp_path):
    return steps.Journal(tmp_path, "a GPU", "abc1234")


def step(steps, code, name="step", **rest):
    return steps.Step(name, [sys.executable, "-c", code], Path.cwd(), **rest)


def run_part(steps, journal, *commands, seconds=60, again=False):
    return steps.run_part("part", commands, journal, time.perf_counter() + seconds, again)


def lines(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def test_without_a_gpu_every_step_is_skipped_and_says_why(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.main(["--out", str(tmp_path)]) == 0
    printed, records = capsys.readouterr().out, lines(tmp_path)
    assert [r["part"] for r in records if r["step"] in ("install", "pytest", "compile", "forward")] == [
        "build", "tests", "peers", "scan", "conv",
    ]  # fmt: skip
    assert {r["part"] for r in records} >= {*report.ORDER, *report.BENCHMARKS}
    assert all(r["status"] == "skipped" and r["reason"] in printed for r in records)
    assert "no NVIDIA GPU" in (tmp_path / "report.md").read_text()


def test_a_missing_tool_or_folder_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    parts = report.parts(tmp_path, "90a-real", None)
    for part, reason in {
        "sanitizer": "compute-sanitizer is neither on PATH nor in", "profile": "ncu is neither",
        "micro": "nvcc is neither", "peers": "--peers gives no folder",
    }.items():  # fmt: skip
        assert all(reason in step.unavailable for step in parts[part]), part
    (build,) = parts["build"]
    assert not build.unavailable and ("ROM_CUDA", "off") in build.environment  # Triton serves the GPU


def test_failures_and_the_time_limit_are_kept_as_they_come(steps, journal, tmp_path):
    def run(code, limit=60):
        return steps.run("part", step(steps, code), journal, limit)

    passed = run("print('one'); print('12 passed')")
    assert (passed.status, passed.last, passed.reason) == ("passed", "12 passed", "")
    assert (tmp_path / "part_step.log").read_text() == "one\n12 passed\n"
    assert "exit code 3" in run("raise SystemExit(3)").reason
    cut = run("print('test_a PASSED', flush=True); import time; time.sleep(60)", limit=1)
    assert cut.status == "timeout" and "test_a PASSED" in cut.reason
    assert [r["status"] for r in lines(tmp_path)] == ["passed", "failed", "timeout"]


def test_the_time_limit_stops_what_a_step_started(steps, journal, tmp_path):
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert steps.run("part", step(steps, code), journal, 0.5).status == "timeout"
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_a_machine_that_forbids_a_tool_skips_it(steps, journal):
    refused = step(steps, "print('== Error: Device not supported'); raise SystemExit(1)", impossible="Device not .*")
    outcome = steps.run("part", refused, journal, 60)
    assert outcome.status == "skipped" and "Device not supported" in outcome.reason


def test_later_steps_keep_their_share_of_the_time(steps, journal, tmp_path):
    slow, quick = step(steps, "import time; time.sleep(60)", "slow"), step(steps, "pass", "quick", weight=9)
    start = time.perf_counter()
    assert run_part(steps, journal, slow, quick, seconds=20)
    assert time.perf_counter() - start < 10
    assert [(r["step"], r["status"]) for r in lines(tmp_path)] == [("slow", "timeout"), ("quick", "passed")]


def test_what_has_no_time_left_is_left_for_the_next_run(steps, journal, capsys):
    assert not run_part(steps, journal, step(steps, "pass"), seconds=0)
    assert not journal.outcomes and "left for the next run" in capsys.readouterr().out


def test_a_later_run_goes_on_where_the_first_one_stopped(steps, tmp_path, capsys):
    commands = [
        step(steps, "print('ran')", "good"),
        step(steps, "raise SystemExit(1)", "bad"),
        step(steps, "import time; time.sleep(60)", "slow", weight=0.02),
        step(steps, "print('ran')", "installed", kept=False),
    ]

    def run(gpu="a GPU", commit="abc1234", again=False):
        before = len(lines(tmp_path)) if (tmp_path / "report.jsonl").exists() else 0
        run_part(steps, steps.Journal(tmp_path, gpu, commit), *commands, seconds=20, again=again)
        return [r["step"] for r in lines(tmp_path)[before:]]

    everything = ["good", "bad", "slow", "installed"]
    assert run() == everything
    assert run() == ["slow", "installed"] and "good, bad; --again repeats" in capsys.readouterr().out
    assert run(again=True) == run(commit="def5678") == run(gpu="another GPU") == everything
    summary = (tmp_path / "report.md").read_text()
    assert summary.count("| good |") == 1


def test_one_file_carries_the_results_to_another_machine(steps, report, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "report.tar.gz"
    (first / "peers").mkdir(parents=True)
    (first / "peers/module.so").write_text("built again")
    arguments = ["--parts", "micro", "--archive", str(archive)]
    report.main(["--out", str(first), *arguments])
    report.main(["--out", str(second), *arguments])
    assert len(lines(second)) == 2 and not (second / "peers").exists()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_the_commit_of_a_copy_without_git(tmp_path, monkeypatch):
    checkout = importlib.import_module("checkout")
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "checkout.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkout.commit() == "unknown"
    monkeypatch.setenv("ROM_COMMIT", "abc1234")
    assert checkout.commit() == "abc1234"


def test_the_report_starts_before_the_package_is_built(tmp_path):
    """On a fresh machine `import rom` fails until the part `build` is done."""
    (tmp_path / "rom.py").write_text("raise ImportError('not built')")
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--out", str(tmp_path / "out"), "--parts", "micro"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_and_family_is_in_the_report(report):
    scripts = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert scripts == set(report.BENCHMARKS)
    assert set(report.FAMILIES) == set(importlib.import_module("launches").FAMILIES)


# ------------------------------------------------------------------------------------------------ what the parts run
@pytest.mark.parametrize("family", ["scan", "decode", "conv", "norm"])
def test_launches(family, capsys):
    assert importlib.import_module("launches").main(["--backend", "cpu", "--family", family]) == 0
    assert ", 0 failures" in capsys.readouterr().out


def test_training_curves(tmp_path, capsys):
    curves = importlib.import_module("train_curves")
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "markdown")]
    assert curves.main(["--device", "cpu", "--steps", "3", "--length", "16", *files]) == 0
    assert "cpu bfloat16" in (tmp_path / "markdown").read_text()
    assert len((tmp_path / "json").read_text().splitlines()) == 4
    flat, steep = curves.Curve("flat", [1.0] * 6, 0), curves.Curve("steep", [1.0] * 5 + [2.0], 0)
    assert flat.distance(steep) == pytest.approx(0.2)


def test_a_profile_is_summarised_by_what_binds(tmp_path):
    profile = importlib.import_module("profile_kernels")
    names = {
        "Kernel Name": ("", "scan_forward<bf16>(args)"),
        "gpu__time_duration.sum": ("nsecond", "412,000"),
        "smsp__issue_active.avg.per_cycle_active": ("inst", "0.91"),
        "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "88.5"),
        "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active": ("%", "30"),
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "33.3"),
        "launch__registers_per_thread": ("register/thread", "96"),
        "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1.5"),
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.5"),
    }
    rows = [names, *([cells[i] for cells in names.values()] for i in (0, 1))]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    log = tmp_path / "profile.csv"
    log.write_text(text)
    launches, units, messages = profile.read(log)
    assert messages == ["==PROF== Connected"]
    assert profile.summary(launches[0], units) == [
        "scan_forward<bf16>", "412", "91", "xu 88.5, lsu 30", "33.3", "96", "", "wait 1.5, barrier 0.5",
    ]  # fmt: skip
    command = profile.command("scan", "triton", log)
    assert command[0] == "ncu" and command[-5:] == ["--large", "--family", "scan", "--backend", "triton"]


def test_micro_measurements_as_a_table():
    measure = importlib.import_module("micro.measure")
    rows = [{"measure": "FFMA", "warps_per_scheduler": n, "value": 1.0 / n, "unit": "cycles"} for n in (1, 2, 4)]
    text = measure.table([*rows, {"measure": "copy", "value": 4300.0, "unit": "GB/s"}])
    assert "| FFMA | 1.00 | 0.50 | 0.25 | cycles |" in text and "| copy | 4300.0 | GB/s |" in text
