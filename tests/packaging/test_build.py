"""Wheels, source distributions and editable installs, built as a user would: isolated, where torch does not exist."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMOKE = (
    "import torch, rom; y, _ = rom.ops.add_rms_norm(torch.ones(2, 4), torch.ones(4));"
    "assert torch.allclose(y, torch.ones(2, 4), atol=1e-4); print(rom.__file__)"
)

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command, cwd=None, **env):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build_wheel(source, folder, **env):
    """Under build isolation: only setuptools, cmake, ninja and pybind11 are there."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def check_wheel(wheel, cuda):
    names = contents(wheel)
    modules = sorted(n.split(".")[0] for n in names if n.endswith(".so"))
    assert modules == ["rom/_C", *(["rom/_C_cuda"] if cuda else [])]
    expected = {
        "rom/py.typed",
        "rom/_C.pyi",
        "rom/_C_cuda.pyi",
        "rom/triton_kernels/__init__.py",
        "rom/cli/__init__.py",
    }
    assert expected <= names
    tops = {n.split("/")[0] for n in names}
    assert len(tops) == 2 and "rom" in tops, tops  # rom and its dist-info; no triton_kernels, no tests
    packages = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "rom").rglob("__init__.py")}
    assert packages <= {str(Path(n).parent) for n in names}, "a package is not listed in pyproject.toml"


@pytest.fixture
def copy(tmp_path):
    """The clone as git sees it, without anything built."""
    listed = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    target = tmp_path / "clone"
    for name in listed:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def environment(tmp_path):
    """The Python of a fresh environment that borrows this one's torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = tmp_path / "borrowed"  # all of this environment but its own rom, or pip would find that and do nothing
    borrowed.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("rom", "__editable__")):
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(str(borrowed))
    return tmp_path / "venv" / "bin" / "python"


def earlier_mode():
    """ROM_CUDA of the latest build in this clone, or None."""
    builds = sorted((ROOT / "build").glob("cmake-*/build.ninja"), key=lambda p: p.stat().st_mtime)
    return builds[-1].parent.name.split("-")[1] if builds else None


@pytest.mark.skipif(earlier_mode() not in ("auto", "on", "off"), reason="nothing was built in this clone yet")
def test_second_build_after_the_first(tmp_path):
    """pip deletes its build environment, and with it the ninja the first build's cache may still name."""
    mode = earlier_mode()
    wheel = build_wheel(ROOT, tmp_path, ROM_CUDA=mode)
    check_wheel(wheel, cuda=any("_C_cuda" in n and n.endswith(".so") for n in contents(wheel)))


@pytest.mark.slow
def test_source_distribution_builds_installs_and_runs(tmp_path, copy, environment):
    run(sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "tools", "build")
    run(sys.executable, "-m", "build", "-s", "-o", tmp_path, copy, PYTHONPATH=str(tmp_path / "tools"))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"CMakeLists.txt", "csrc/include/rom/abi.h", "csrc/cpu/norm.cpp", "python/module.cpp", "LICENSE"} <= names
    wheel = build_wheel(sdist, tmp_path, ROM_CUDA="off")
    check_wheel(wheel, cuda=False)
    run(environment, "-m", "pip", "install", "-q", "--no-deps", wheel)
    assert str(tmp_path / "venv") in run(environment, "-c", SMOKE, cwd=tmp_path)


@pytest.mark.slow
def test_editable_install(tmp_path, copy, environment):
    (copy / "rom" / f"_C_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"yesterday's")
    for _ in range(2):  # twice: the second finds the first one's cache
        run(environment, "-m", "pip", "install", "-q", "--no-deps", "-e", copy, ROM_CUDA="off")
    assert str(copy / "rom") in run(environment, "-c", SMOKE, cwd=tmp_path)
    assert (copy / "rom" / "_C.pyi").exists()
    assert [path.name for path in (copy / "rom").glob("*.so")] == [f"_C{EXTENSION_SUFFIXES[0]}"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_build_without_a_gpu_and_a_cpu_build_after_it(tmp_path, copy):
    cuda = {"ROM_CUDA": "on", "ROM_CUDA_ARCHS": ""}  # the default ones, the gate builds for Hopper alone
    check_wheel(build_wheel(copy, tmp_path / "cuda", **cuda), cuda=True)
    check_wheel(build_wheel(copy, tmp_path / "cpu", ROM_CUDA="off"), cuda=False)  # yesterday's module is not shipped


@pytest.mark.slow
def test_cuda_on_without_nvcc_says_what_to_do(tmp_path, copy):
    tools = tmp_path / "bin"  # a PATH with everything but nvcc
    tools.mkdir()
    for name in ("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "sh", "uname", "nm", "strip"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    env = {"ROM_CUDA": "on", "PATH": str(tools), "CUDACXX": "", "CUDA_PATH": ""}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(copy)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ROM_CUDA=on but no nvcc was found" in done.stdout + done.stderr
