import json

import pytest
import torch

import rom
from rom import cli, doctor


def test_prints_every_backend_with_its_reason(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for row in rom.backends():
        line = next(x for x in text.splitlines() if x.split()[:2] == [row.op, row.backend])
        assert row.available or row.reason in line
    assert "no problems found" in text and rom.native.cpu_isa() in text


def test_json_is_the_same_report(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["problems"] == []


def test_every_operator_has_a_smoke_run():
    assert set(doctor.ARGUMENTS) == {row.op for row in rom.backends()}
    assert all(s["result"] == "ok" for s in doctor.smoke())


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    call = rom.native.call

    def wrong(kernel, device, **arguments):
        call(kernel, device, **arguments)
        if kernel == "norm_forward":
            arguments["out"].mul_(1.01)

    monkeypatch.setattr(rom.native, "call", wrong)
    assert cli.main(["doctor"]) == 1
    assert "add_rms_norm on cpu: output 0 differs from the reference by" in capsys.readouterr().out


@pytest.mark.parametrize("probe", ["_machine", "_versions", "_gpus", "_native", "smoke"])
def test_a_failing_probe_is_a_line_and_not_a_traceback(monkeypatch, capsys, probe):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, probe, broken)
    assert cli.main(["doctor"]) == 1
    assert "unknown (OSError: no such thing)" in capsys.readouterr().out


def test_names_another_package_called_rom(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_foreign", lambda: ["rom 1.1.2"])
    assert cli.main(["doctor"]) == 1
    assert "another package also installs `rom`" in capsys.readouterr().out


def test_names_the_variables_that_matter(monkeypatch, capsys):
    monkeypatch.setenv("ROM_BACKEND", "strict")
    cli.main(["doctor"])
    assert "ROM_BACKEND              strict" in capsys.readouterr().out


def test_docstring(run_doctests):
    run_doctests(doctor)
