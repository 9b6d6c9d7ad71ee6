"""Every GPU kernel compiles for Hopper within the resources of resources.toml, on a machine without a GPU."""

import importlib
import importlib.util
import math
from pathlib import Path

import pytest
from gates import build, sass

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

HERE = Path(__file__).parent
TABLE = tomllib.loads((HERE / "resources.toml").read_text())
MAX_SHARED = 227 * 1024  # per block on sm_90


needs_cuobjdump = pytest.mark.skipif(sass.find_cuobjdump() is None, reason="no cuobjdump (CUDA or the triton wheel)")


def per_element(code, elements):
    """Instructions a scan's forward issues per element: the recurrence, the step sizes before it, the gate after it.

    The recurrence is the largest loop with exponentials. The leanest loops with and without a reciprocal are the gate
    and the step sizes of the usual case; an exponential in them serves one (step, channel), so 16 elements.
    """
    loops = [loop for loop in sass.loops(code) if loop.count("MUFU.EX2")]
    recurrence = max(loops, key=lambda loop: loop.size)
    others = [loop for loop in loops if loop.count("MUFU.EX2") * 4 < recurrence.count("MUFU.EX2")]
    around = [
        min(loop.size / (16 * loop.count("MUFU.EX2")) for loop in others if bool(loop.count("MUFU.RCP")) == gate)
        for gate in (False, True)
    ]
    return recurrence.size / elements + sum(around)


def adjoint_per_element(code):
    """Instructions a scan's backward issues per (step, channel, state): in the 8 steps of sweep(), and in all.

    The loop with most multiply-adds does 8 steps of two strips, so 64 elements per lane: first sweep(), which has no
    addition, then finish() and add_copies(). Around it the loop over tiles, four times as much, on the way of a usual
    call: there are a gate and softplus, memory is moved in packs, no row_index. Per tile replay(), the other loop with
    exponentials and no reciprocals, runs over three of four parts.
    """
    loops = sass.loops(code)
    parts = max(loops, key=lambda loop: loop.count("FFMA"))
    tiles = next(loop for loop in loops if loop.depth == parts.depth - 1 and loop.begin <= parts.begin <= loop.end)
    inner = [loop for loop in loops if tiles.begin < loop.begin <= tiles.end and loop is not parts]
    replay = max(inner, key=lambda loop: loop.count("MUFU.EX2"))
    packs = [f"{move}.E.{bits}" for move in ("LDG", "STG") for bits in (64, 128)]
    usual = sass.busiest_path(code, tiles, "MUFU.EX2", *packs).total()
    opcodes = [opcode for address, opcode, _ in code if parts.begin <= address <= parts.end]
    return opcodes.index("FADD") / 64, parts.size / 64 + usual / 256 + replay.size / 64 * 3 / 4


def fma_share(code):
    """The share of multiply-adds among the instructions of the loop that is densest in them, of 32 or more."""
    counted = [(loop.count("FFMA", "DFMA"), loop.size) for loop in sass.loops(code)]
    return max((count / size for count, size in counted if count >= 32), default=0)


def per_pivot(code):
    """Instructions per pivot of an elimination in registers, whose loop has 4 pivots and at least 7 shuffles each."""
    return min((loop.size / 4 for loop in sass.loops(code) if loop.count("SHFL.IDX") >= 28), default=math.inf)


def check(row, resources, code):
    """`resources` and `code` of all instantiations of one kernel against its row."""
    for name, used in resources.items():
        assert used.stack == 0, f"{name}: {used.stack} bytes of stack: registers spill"
        assert used.registers <= row["registers"], f"{name}: {used.registers} registers > {row['registers']}"
        assert used.shared <= min(row["shared"], MAX_SHARED), f"{name}: {used.shared} bytes of shared memory"
    for instruction in row.get("contains", []):
        assert any(op.startswith(instruction) for c in code.values() for _, op, _ in c), f"no {instruction}"
    if "loop" in row:
        largest = max((loop.size for c in code.values() for loop in sass.loops(c)), default=0)
        assert largest <= row["loop"], f"{largest} instructions in the largest loop > {row['loop']}"
    if "fma" in row:
        shares = {name: fma_share(c) for name, c in code.items()}
        assert min(shares.values()) >= row["fma"], f"{shares} of the instructions are multiply-adds, < {row['fma']}"
    if "pivot" in row:
        counts = {name: per_pivot(c) for name, c in code.items()}
        assert max(counts.values()) <= row["pivot"], f"{counts} instructions per pivot > {row['pivot']}"
    for part, elements, most in row.get("budget", []):
        counts = [per_element(c, elements) for name, c in code.items() if part in name]
        assert counts and max(counts) <= most, f"{part}: {counts} instructions per element > {most}"
    for part, *most in row.get("adjoint", []):
        (counts,) = (adjoint_per_element(c) for name, c in code.items() if part in name)
        assert all(n <= m for n, m in zip(counts, most)), f"{part}: {counts} instructions per element > {most}"


@needs_cuobjdump
@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", sorted(p.name for p in (build.CSRC / "cuda").glob("*.cu")))
def test_cuda(source, tmp_path):
    rows = TABLE["cuda"].get(source)
    assert rows, f"{source} has no rows in tests/gates/resources.toml"
    cubin = build.built_cuda(source, tmp_path) or build.compile_cuda(source, tmp_path)  # compiling takes a minute
    used, code = sass.resources(cubin), sass.instructions(cubin)
    # A mangled name spells every identifier with its length in front: 13norm_backward is not 20norm_backward_reduce.
    kernels = {name: [k for k in rows if f"{len(k)}{k}" in name] for name in used}
    assert all(kernels.values()), f"without a row: {[name for name, found in kernels.items() if not found]}"
    for kernel, row in rows.items():
        names = [name for name, found in kernels.items() if kernel in found]
        assert names, f"{source} has no kernel {kernel} any more"
        for limits in (row, *row.get("instances", [])):
            chosen = [name for name in names if limits.get("match", "") in name]
            assert chosen, f"{source}: no instance of {kernel} has {limits['match']} in its name"
            check(limits, {n: used[n] for n in chosen}, {n: code[n] for n in chosen})


@needs_cuobjdump
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("module, name", [(m, k) for m, rows in TABLE["triton"].items() for k in rows])
def test_triton(module, name, tmp_path):
    import triton.language as tl

    row = TABLE["triton"][module][name]
    kernel = row.get("kernel", name)
    signature = row["pointers"] | dict.fromkeys(row["integers"], "i32")
    constants = {n: getattr(tl, v, v) if isinstance(v, str) else v for n, v in row["constants"].items()}
    if "tile" in row:
        tile = importlib.import_module(f"rom.triton_kernels.{module}").TILES[row["tile"]]
        constants |= {n: v for n, v in tile.items() if n.isupper()}
        row = row | {n: v for n, v in tile.items() if n.islower()}
        signature = {n: kind.format(**tile) for n, kind in signature.items()}
    options = {n: row[n] for n in ("num_warps", "num_stages") if n in row}
    cubin, shared = build.compile_triton(module, kernel, tmp_path, signature, constants, options)
    assert shared <= row["shared"], f"{shared} bytes of shared memory > {row['shared']}"
    check(row | {"shared": MAX_SHARED}, sass.resources(cubin), sass.instructions(cubin))
