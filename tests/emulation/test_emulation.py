"""The CUDA sources run on the CPU, one thread per CUDA thread, and the sanitizers look on (see cuda_on_cpu.hpp)."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FAMILIES = ["norm", "scan_forward", "scan_backward"]
# Many instances: by default these are built only with a sanitizer, once each. The decode steps have no barrier.
MANY = ["state_update", "conv_update", "orthogonal"]
# Removing any barrier must be noticed: (family, source, statement, which of them).
MUTANTS = [("norm", "reduce.cuh", "__syncthreads();", 1)]
SLOW_MUTANTS = [
    ("norm", "reduce.cuh", "__syncthreads();", 0),
    ("norm", "norm.cu", "__syncthreads();", 0),
    ("scan_forward", "scan_forward.cuh", "__syncthreads();", 0),
    ("scan_forward", "scan_forward.cuh", "__syncwarp();", 0),
    ("scan_forward", "scan_forward.cuh", "__syncwarp();", 1),
    ("scan_forward", "scan_forward.cuh", "async_wait<0>();", 0),
    *(("scan_backward", "scan_backward.cuh", "__syncthreads();", which) for which in (1, 2, 3, 4)),
    *(("scan_backward", "scan_backward.cuh", "__syncwarp();", which) for which in (0, 1)),
    *(("orthogonal", "matrix_inverse.cuh", "team.sync();", which) for which in range(9)),
    *(("orthogonal", "orthogonal.cuh", "this->sync();", which) for which in range(6)),
    # not those after shuffles, which the emulation takes for a barrier, and before the second stage of 128 columns
    *(("orthogonal", "orthogonal_cayley.cuh", "work.sync();", which) for which in (0, *range(2, 8))),
    *(("orthogonal", "orthogonal_householder.cuh", "work.sync();", which) for which in range(1, 10)),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")


def build(family, folder, sanitizer="", csrc=CSRC, quick=False):
    """Compiles csrc/cuda/<family>.cu and its test with g++ alone; optimising would cost more time than it saves.

    `quick` defines QUICK for tests that then include the few kernels they run, instead of linking all of the source.
    """
    program = folder / f"{family}{sanitizer.replace(',', '_')}"
    flags = ["-std=c++20", "-O0", "-g1", "-pthread", "-DROM_CUDA_ON_CPU"]
    flags += [f"-I{folder}" for folder in (csrc, csrc / "include", HERE)]
    sources = [csrc / "core" / "status.cpp", HERE / f"test_{family}.cpp"]
    if quick and "QUICK" in sources[1].read_text():
        flags.append("-DQUICK")
    else:
        sources += sorted((csrc / "cuda").glob(f"{family}*.cu"))
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    subprocess.run(["g++", *flags, *sanitize, "-x", "c++", *sources, "-o", program], check=True)
    return program


def run(program, *arguments):
    result = subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("address randomisation is too wide for g++'s ThreadSanitizer: sysctl vm.mmap_rnd_bits=28")
    return result


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MANY)])
def test_against_a_double_loop(family, tmp_path):
    result = run(build(family, tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [("quick",), pytest.param((), marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_sanitizer(family, sanitizer, arguments, tmp_path):
    result = run(build(family, tmp_path, sanitizer, quick=bool(arguments)), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "sanitizer, arguments",
    [("thread", ("quick",)), ("address", ("quick",)), pytest.param("address,undefined", (), marks=pytest.mark.slow)],
    ids=["thread", "address", "all"],
)
@pytest.mark.parametrize("family", MANY)
def test_many_instances_under_a_sanitizer(family, sanitizer, arguments, tmp_path):
    result = run(build(family, tmp_path, sanitizer, quick=bool(arguments)), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "family, source, statement, which",
    [*MUTANTS, *(pytest.param(*mutant, marks=pytest.mark.slow) for mutant in SLOW_MUTANTS)],
)
def test_a_removed_barrier_is_found(family, source, statement, which, tmp_path):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    path = csrc / "cuda" / source
    parts = path.read_text().split(statement)
    assert len(parts) > which + 1, f"{source} has {len(parts) - 1} {statement}: the list of mutants is out of date"
    path.write_text(statement.join(parts[: which + 1]) + statement.join(parts[which + 1 :]))
    result = run(build(family, tmp_path, "thread", csrc, quick=True), "quick")
    found = "data race" in result.stderr or "FAILED" in result.stdout
    assert result.returncode != 0 and found, result.stdout + result.stderr
