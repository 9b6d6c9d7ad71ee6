import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate")
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    return importlib.import_module(name)


def options(*argv):
    harness = load("harness")
    return harness.parse(harness.arguments("test"), ["--device", "cpu", "--quick", "--seconds", "0.05", *argv])


def benchmark(*argv):
    return load("harness").Benchmark("test", options(*argv), load("machine").Peak(1e10, 1e9, 1e10))


def case(*contenders, dtype=torch.float32, **rest):
    return load("harness").Case("square", "(3,)", contenders, lambda: (torch.tensor([1.0, 4.0, 9.0]),), dtype, **rest)


def contender(name, function=lambda x: x * x, **rest):
    x = torch.tensor([1.0, 2.0, 3.0])
    return load("harness").Contender(name, lambda: lambda: (function(x),), **rest)


def test_quantiles_interpolate():
    samples = load("timing").Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert samples.median == 3.0
    assert (samples.quantile(0.0), samples.quantile(0.2), samples.quantile(0.8), samples.quantile(1.0)) == (
        1,
        1.8,
        4.2,
        5,
    )


def test_contenders_take_turns_ours_before_every_peer():
    timing, order = load("timing"), []
    calls = [(lambda name=name: order.append(name), 1.0, lambda: None) for name in ("ours", "a", "b")]
    samples = timing.take_turns(timing.Clock("wall"), calls, seconds=0)
    assert order == ["ours", "a", "ours", "b"] * 2
    assert [len(s.seconds) for s in samples] == [4, 2, 2]


def test_short_calls_are_timed_many_at_a_time():
    timing, count = load("timing"), []
    timing.take_turns(timing.Clock("wall"), [(lambda: count.append(1), 1e-4, lambda: None)], seconds=0)
    assert len(count) == 2 * round(timing.MIN_SAMPLE_SECONDS / 1e-4)


def test_missing_wrong_and_slow_contenders_are_named_and_not_timed():
    harness, run = load("harness"), benchmark()
    rows = run.run(
        case(
            contender("ours"),
            contender("peer"),
            harness.Contender("absent", missing="absent is not installed; `pip install absent`"),
            contender("wrong", lambda x: x + x),
            contender("nan", lambda x: x * float("nan")),
            contender("slow", predict=lambda: 27.0),
            cost=harness.Cost(1e5, 0, 1e3),
        )
    )
    ours, peer, absent, wrong, nan, slow = rows
    assert ours.ratio == 1 and peer.ratio == peer.median / ours.median and ours.error == 0
    assert ours.floor == pytest.approx(1e-5) and not ours.note and ours.fraction == ours.floor / ours.median
    assert all(row.median is None and row.ratio is None for row in (absent, wrong, nan, slow))
    assert "pip install absent" in absent.note and "27 s" in slow.note
    assert wrong.note == nan.note == "not timed: its result is wrong"
    table = run.table()
    assert all(name in table for name in ("absent is not installed", "about 27 s", "its result is wrong"))


def test_a_call_that_does_the_work_many_times_counts_once():
    once, often = benchmark().run(case(contender("ours"), contender("peer", lambda x: x * x, repeats=1000)))
    assert often.median < once.median


def test_a_peer_that_fails_is_named_and_the_others_run():
    def fail(x):
        raise RuntimeError("no kernel image\nand more")

    ours, broken, peer = benchmark().run(case(contender("ours"), contender("broken", fail), contender("peer")))
    assert broken.note == "failed: RuntimeError: no kernel image" and ours.median > 0 and peer.ratio > 0


def test_a_failure_of_ours_is_the_exit_code():
    run = benchmark()
    run.run(case(contender("rom", lambda x: x + 1), contender("peer")))
    with pytest.raises(SystemExit, match=r"rom, square .* its result is wrong"):
        run.finish()


def test_a_wrong_result_of_ours_gives_no_ratio():
    rows = benchmark().run(case(contender("ours", lambda x: x + 1), contender("peer")))
    assert rows[0].note and rows[1].median > 0 and rows[1].ratio is None


def test_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "markdown", "plot")}
    paths["plot"] = tmp_path / "plot.png"
    run = benchmark("--targets", *(part for kind, path in paths.items() for part in (f"--{kind}", str(path))))
    run.run(case(contender("ours"), contender("peer")))
    target = load("harness").Target
    run.finish([target("square", "(3,)", "peer", 1e-9), target("square", "(3,)", "peer", 1e9), target("x", "", "", 1)])
    printed = capsys.readouterr().out
    assert "| yes" in printed and "| NO" in printed and "not measured" in printed
    assert paths["markdown"].read_text() in printed
    with paths["csv"].open() as file:
        assert [line["contender"] for line in csv.DictReader(file)] == ["ours", "peer"]
    assert [json.loads(line)["contender"] for line in paths["json"].read_text().splitlines()] == ["ours", "peer"]
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")


def test_options_are_checked(capsys):
    with pytest.raises(SystemExit):
        load("bench_scan").main(["--shape", "1,2,3"])
    assert "expected four positive sizes" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::rom.dispatch.FallbackWarning")
@pytest.mark.parametrize(
    "name, argv",
    [
        ("bench_scan", ["--shape", "1,5,8,4", "--forward", "--decode"]),
        ("bench_scan", ["--shape", "2,5,8,4", "--backward"]),
        ("bench_conv", ["--shape", "2,5,8"]),
        ("bench_norm", ["--shape", "5,16"]),
        ("bench_block", ["--shape", "2,5,16", "--experts", "4", "--top-k", "2"]),
    ],
)
def test_smoke(name, argv, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # seconds of compiler per peer
    monkeypatch.setattr(load("harness"), "measure_peak", lambda device: load("machine").Peak(1e10, 1e9, 1e10))
    rows = load(name).main(["--device", "cpu", "--quick", "--seconds", "0.01", *argv])
    capsys.readouterr()
    assert all(row.note or row.median > 0 for row in rows)
    assert not [row for row in rows if "wrong" in row.note]
    assert all(module in sys.modules for module in ("harness", "timing", "machine"))
