"""benchmarks/micro/micro.cu times what it says: every loop holds the instructions it counts, and no others."""

from collections import Counter
from pathlib import Path

import pytest
from gates import build, sass

SOURCE = Path(__file__).parent.parent.parent / "benchmarks/micro/micro.cu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on PATH"),
    pytest.mark.skipif(sass.find_cuobjdump() is None, reason="no cuobjdump (CUDA or the triton wheel)"),
]


@pytest.fixture(scope="module")
def longest_loops(tmp_path_factory):
    """Opcodes, without suffixes other than a vector's width, of every kernel's longest loop."""
    cubin = build.nvcc_cubin(SOURCE, tmp_path_factory.mktemp("micro"))
    loops = {name: max(sass.loops(code), key=lambda loop: loop.size) for name, code in sass.instructions(cubin).items()}

    def find(part):
        names = [name for name in loops if part in name]
        assert len(names) == 1, f"{part}: {names}"
        return loops[names[0]]

    return find


@pytest.mark.parametrize("body, opcode", [("4FfmaE", "FFMA"), ("3Ex2E", "MUFU.EX2")])
def test_issue_rates(longest_loops, body, opcode):
    loop = longest_loops(body)
    assert loop.count(opcode) == 64 and loop.size <= 68


@pytest.mark.parametrize("addresses, fmas", [(1, 1), (4, 1), (32, 1), (1, 4), (1, 8), (1, 16), (4, 8)])
def test_loads_from_shared_memory(longest_loops, addresses, fmas):
    loop = longest_loops(f"Lds128ILi{addresses}ELi{fmas}EE")
    assert loop.opcodes["LDS.128"] == 16 and loop.count("FFMA") == 16 * fmas and loop.size <= 16 * (fmas + 1) + 6


@pytest.mark.parametrize("polynomials", range(5))
@pytest.mark.parametrize("body, rest", [("12Exponentials", 32), ("8ScanStep", 64)])
def test_exponentials_by_two_pipes(longest_loops, body, rest, polynomials):
    loop = longest_loops(f"{body}ILi{polynomials}EE")
    # A polynomial: clamp, three additions around the rounding, five FFMA, and the exponent added by one LEA.
    expected = Counter({"MUFU.EX2": 16 - polynomials, "FMNMX": polynomials, "LEA": polynomials})
    assert all(loop.opcodes[opcode] == n for opcode, n in expected.items())
    assert loop.count("F", "MUFU", "LEA") - (16 + 9 * polynomials + rest) in (1, 2)  # δ moves on


@pytest.mark.parametrize("vector, width", [("uint2", 64), ("uint4", 128)])
def test_memory(longest_loops, vector, width):
    copy, read = (longest_loops(f"{kernel}I5{vector}E") for kernel in ("4copy", "4read"))
    assert copy.count(f"LDG.E.{width}") == read.count(f"LDG.E.{width}") == 4
    assert copy.count(f"STG.E.{width}") == 4
