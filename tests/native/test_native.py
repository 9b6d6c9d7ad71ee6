"""Builds the C++ tests of the core (no Python, no torch) and runs them: sanitized, as shipped, and on aarch64."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
SANITIZED = ["-DROM_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"]
AARCH64 = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu",
]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
    reason="needs cmake, ninja (`pip install cmake ninja`) and a C++ compiler",
)


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(str(c) for c in command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build_and_test(folder, *options):
    off = ["-DROM_TESTS=ON", "-DROM_PYTHON=OFF", "-DROM_CUDA=OFF"]
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *off, *options)
    run("cmake", "--build", folder)
    assert "100% tests passed" in run("ctest", "--test-dir", folder, "--output-on-failure")


def foreign_symbols(folder, allowed=r"(?!)"):
    """Symbols the objects of one instruction set define for everybody, besides their own entry points."""
    found = []
    for obj in folder.glob("CMakeFiles/rom_cpu_*.dir/csrc/cpu/*.o"):
        isa = obj.relative_to(folder / "CMakeFiles").parts[0].removeprefix("rom_cpu_").removesuffix(".dir")
        ours = rf"rom_\w+_{isa}" + (r"|rom_\w+_cpu" if isa == "base" else "")
        for line in run("nm", "-C", "--defined-only", "--extern-only", obj).splitlines():
            name = line.split(maxsplit=2)[2]
            if not re.fullmatch(rf"{ours}|{allowed}", name) and "asan" not in name:
                found.append(f"{obj.name} ({isa}): {name}")
    return found


def test_core_under_the_sanitizers_on_every_instruction_set(tmp_path):
    build_and_test(tmp_path, *SANITIZED)
    # An inline function shared between instruction sets is an illegal instruction on older machines. Without
    # optimisation every one of them shows; only <cmath>'s one-line overloads are excused (they inline in real builds).
    assert not foreign_symbols(tmp_path, allowed=r"std::\w+\([a-z ,]*\)")


@pytest.mark.slow
def test_core_as_shipped(tmp_path):
    build_and_test(tmp_path)
    assert not foreign_symbols(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_core_on_aarch64(tmp_path):
    build_and_test(tmp_path, *AARCH64)


@pytest.mark.slow
def test_operators_over_a_sanitized_extension(tmp_path):
    """The operators' Python tests, on a copy of the package whose CPU module carries ASan and UBSan."""
    package = tmp_path / "site" / "rom"
    shutil.copytree(ROOT / "rom", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels")
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    build = tmp_path / "build"
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DROM_CUDA=OFF", f"-DROM_OUTPUT_DIR={package}", *python,
        "-DROM_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1")  # fmt: skip
    run("cmake", "--build", build)
    runtime = [run("c++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan", "stdc++")]
    env = os.environ | {
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # what the interpreter keeps until its end is not ours
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    # Compiled graphs are left out: their code is built by another compiler run that does not know the sanitizers.
    chosen = ["-k", "not compile and not export and not opcheck", "--capture=sys"]
    pytest_command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    done = subprocess.run(
        [*pytest_command, "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "ops"), *chosen],
        env=env,
        cwd=tmp_path,  # not the clone's root, whose rom/ would be found first
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
