"""Cubins for sm_90a without a GPU: CUDA sources by nvcc, Triton kernels by Triton's own compiler."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from gates import sass

CSRC = Path(__file__).parent.parent.parent / "csrc"


def find_nvcc() -> str | None:
    """nvcc's path, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def built_cuda(source: str, folder: Path) -> Path | None:
    """csrc/cuda/<source> for sm_90a, out of the installed rom._C_cuda; None if that is not there or older than csrc."""
    spec, tool = importlib.util.find_spec("rom._C_cuda"), sass.find_cuobjdump()
    if spec is None or spec.origin is None or tool is None:
        return None
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
    if Path(spec.origin).stat().st_mtime < newest:
        return None
    listed = subprocess.run([tool, "-lelf", spec.origin], check=True, capture_output=True, text=True).stdout
    found = re.search(rf"{re.escape(Path(source).stem)}(\.\d+)?\.sm_90a?\.cubin", listed)
    if found is None:
        return None
    subprocess.run([tool, "-xelf", found[0], spec.origin], check=True, capture_output=True, cwd=folder)
    return folder / found[0]


def nvcc_cubin(source: Path, folder: Path, *flags: str) -> Path:
    """A CUDA source as a cubin for sm_90a."""
    cubin = folder / f"{source.name}.cubin"
    nvcc = find_nvcc()
    assert nvcc, "ask find_nvcc first"
    target = ["-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a"]
    subprocess.run([nvcc, "-cubin", *target, *flags, str(source), "-o", str(cubin)], check=True)
    return cubin


def compile_cuda(source: str, folder: Path) -> Path:
    """csrc/cuda/<source> for sm_90a, with the flags of CMakeLists.txt: a register spill is an error."""
    flags = ["-DNDEBUG", "--expt-relaxed-constexpr", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    return nvcc_cubin(CSRC / "cuda" / source, folder, *flags, "-Xptxas", "--warn-on-spills,--warning-as-error")


def compile_triton(
    module: str,
    kernel: str,
    folder: Path,
    signature: dict[str, str],
    constants: dict[str, object],
    options: dict[str, int],
) -> tuple[Path, int]:
    """A @triton.jit function of rom.triton_kernels.<module> for sm_90: (cubin, bytes of shared memory).

    `signature` gives every run-time argument its type ("*bf16", "i32", "tensordesc<bf16[64,64]>"), `constants` the
    others their values; a tensor in neither is absent. Pointers and integers count as multiples of 16, as in a model,
    or loads would not vectorise. options: num_warps, num_stages.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(importlib.import_module(f"rom.triton_kernels.{module}"), kernel)
    types = {name: signature.get(name, "constexpr") for name in function.arg_names}
    whole = ("constexpr", "tensordesc")  # of which nothing is a multiple
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if not kind.startswith(whole)}
    values = {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    source = ASTSource(function, types, constexprs=values, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / f"{module}_{kernel}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return cubin, compiled.metadata.shared
