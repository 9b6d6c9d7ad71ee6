"""Every Python block of the pages runs, every link leads somewhere, every command line of the README works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rom import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def command_lines():
    """The README's, with the part that installs left out (tests/packaging installs)."""
    for block in blocks(ROOT / "README.md", "bash"):
        for line in block.splitlines():
            commands = [c.strip() for c in line.split("&&")]
            yield from (c for c in commands if not c.startswith("pip install") and c != "pytest")


@pytest.mark.filterwarnings("default::rom.dispatch.FallbackWarning")  # the pages run on any machine
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_installs_in_one_line_with_the_tested_versions():
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert any(
        re.fullmatch(r"pip install '\.\[bench,train\]' -c constraints\.txt && .*bench_scan.*rom train.*", x)
        for x in lines
    )
    assert "pip install '.[test]' -c constraints.txt && pytest" in lines


@pytest.mark.parametrize("line", list(command_lines()))
def test_readme_commands_exist(line):
    words = shlex.split(line)
    if words[0] == "rom":
        cli.build_parser().parse_args(words[1:])
    else:
        assert words[0] == "python" and (ROOT / words[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", list(command_lines()))
def test_readme_commands_work(line, tmp_path):
    for name in ("benchmarks", "rom"):  # the unbuilt source tree beside the script, as in a clone
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(script, tmp_path):
    if (ROOT / "tests" / "examples" / f"test_{script.name}").exists():
        pytest.skip("needs arguments, and has a test of its own")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
