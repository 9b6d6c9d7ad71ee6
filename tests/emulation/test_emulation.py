"""The CUDA sources run on the CPU, one thread per CUDA thread, and the sanitizers look on (see cuda_on_cpu.hpp)."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FAMILIES = ["norm"]
# Removing any barrier must be noticed. (source, which of its __syncthreads()); only the first mutant runs by default.
MUTANTS = [("reduce.cuh", 1), ("reduce.cuh", 0), ("norm.cu", 0)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")


def build(family, folder, sanitizer="", csrc=CSRC):
    """Compiles csrc/cuda/<family>.cu and its test with g++ alone."""
    program = folder / f"{family}{sanitizer.replace(',', '_')}"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-DROM_CUDA_ON_CPU"]
    flags += [f"-I{folder}" for folder in (csrc, csrc / "include", HERE)]
    sources = [csrc / "cuda" / f"{family}.cu", csrc / "core" / "status.cpp", HERE / f"test_{family}.cpp"]
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    subprocess.run(["g++", *flags, *sanitize, "-x", "c++", *sources, "-o", program], check=True)
    return program


def run(program, *arguments):
    result = subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("address randomisation is too wide for g++'s ThreadSanitizer: sysctl vm.mmap_rnd_bits=28")
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_against_a_double_loop(family, tmp_path):
    result = run(build(family, tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [("quick",), pytest.param((), marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_sanitizer(family, sanitizer, arguments, tmp_path):
    result = run(build(family, tmp_path, sanitizer), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "source, which",
    [MUTANTS[0], *(pytest.param(*mutant, marks=pytest.mark.slow) for mutant in MUTANTS[1:])],
)
def test_a_removed_barrier_is_found(source, which, tmp_path):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    path = csrc / "cuda" / source
    parts = path.read_text().split("__syncthreads();")
    assert len(parts) > which + 1, f"{source} has {len(parts) - 1} barriers: the list of mutants is out of date"
    path.write_text("__syncthreads();".join(parts[: which + 1]) + "__syncthreads();".join(parts[which + 1 :]))
    result = run(build("norm", tmp_path, "thread", csrc), "quick")
    assert result.returncode != 0 and "data race" in result.stderr, result.stdout + result.stderr
