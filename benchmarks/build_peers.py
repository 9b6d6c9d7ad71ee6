"""mamba-ssm's and causal-conv1d's CUDA kernels from their source distributions, for one GPU and without a network.

    export MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE      # on a machine with a network and torch
    pip download --no-deps --no-build-isolation --no-binary :all: -d SDISTS mamba_ssm causal_conv1d
    python benchmarks/build_peers.py --sdists SDISTS --out FOLDER             # on the machine with the GPU
    PYTHONPATH=FOLDER python benchmarks/bench_scan.py

Their own builds make every kernel for up to nine architectures. Here each (kernel, dtype) is a translation unit of its
own, for the visible GPU only, compiled side by side with their flags; complex numbers are left out. FOLDER then holds
`selective_scan_cuda`, `causal_conv1d_cuda`, causal_conv1d's Python code, and mamba-ssm's Triton decode step.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DTYPES = {"fp32": "float", "fp16": "at::Half", "bf16": "at::BFloat16"}
# mamba-ssm's setup.py and causal-conv1d's, without -lineinfo and -v; C++20 for today's torch headers.
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
FLAGS += [f"-U__CUDA_NO_{what}__" for what in (
    "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS",
    "BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS",
)]  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A package: its sdist's name, the module built from it, its sources, and the Python files that go along."""

    name: str
    module: str
    sources: str
    python: tuple[str, ...]


MAMBA = Peer(
    "mamba_ssm",
    "selective_scan_cuda",
    "csrc/selective_scan",
    ("mamba_ssm/ops/triton/selective_state_update.py", "mamba_ssm/ops/triton/softplus.py"),
)
CONV = Peer(
    "causal_conv1d",
    "causal_conv1d_cuda",
    "csrc",
    ("causal_conv1d/__init__.py", "causal_conv1d/causal_conv1d_interface.py", "causal_conv1d/cpp_functions.py"),
)


class BuildError(Exception):
    """Why a peer could not be built."""


def mamba_units(sources: Path) -> dict[str, str]:
    """File name → text. The binding also names complex kernels, so these exist and refuse."""
    units = {"selective_scan.cpp": (sources / "selective_scan.cpp").read_text()}
    needs = ("<c10/cuda/CUDAStream.h>", "<c10/util/BFloat16.h>", "<c10/util/Half.h>", "<c10/util/complex.h>")
    refused = "".join(f"#include {header}\n" for header in (*needs, '"selective_scan.h"'))
    for way, parameters in (("fwd", "SSMParamsBase"), ("bwd", "SSMParamsBwd")):
        signature = f"({parameters} &params, cudaStream_t stream)"
        refused += (
            f"template <typename T, typename W> void selective_scan_{way}_cuda{signature} "
            '{ TORCH_CHECK(false, "built without complex numbers"); }\n'
        )
        for dtype, spelled in DTYPES.items():
            kernel = f"template void selective_scan_{way}_cuda<{spelled},"
            units[f"{way}_{dtype}.cu"] = f'#include "selective_scan_{way}_kernel.cuh"\n{kernel} float>{signature};\n'
            refused += f"{kernel} c10::complex<float>>{signature};\n"
    return {**units, "complex.cpp": refused}


def conv_units(sources: Path) -> dict[str, str]:
    """File name → text: each .cu in three, by the input's dtype."""
    units = {"causal_conv1d.cpp": (sources / "causal_conv1d.cpp").read_text()}
    for way in ("fwd", "bwd", "update"):
        text = (sources / f"causal_conv1d_{way}.cu").read_text()
        instantiation = re.compile(r"^template void causal_conv1d\w*<([\w:]+), .*;\n?", re.MULTILINE)
        body, found = instantiation.sub("", text), list(instantiation.finditer(text))
        for dtype, spelled in DTYPES.items():
            units[f"{way}_{dtype}.cu"] = body + "\n" + "\n".join(m[0] for m in found if m[1] == spelled)
    return units


def unpack(peer: Peer, sdists: Path, work: Path) -> Path:
    """The unpacked source distribution."""
    found = sorted(sdists.glob(f"{peer.name}-*.tar.gz"))
    if not found:
        raise BuildError(f"no {peer.name}-*.tar.gz in {sdists}")
    with tarfile.open(found[-1]) as archive:
        archive.extractall(work, filter="data")
    return work / found[-1].name.removesuffix(".tar.gz")


def compile_units(peer: Peer, units: dict[str, str], sources: Path, work: Path, architecture: str, jobs: int) -> None:
    """Every unit to an object file in `work`, `jobs` at a time; its messages go to `work`/UNIT.log."""
    from torch.utils.cpp_extension import include_paths

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xcompiler", "-fPIC"]
    flags += [f"-DTORCH_EXTENSION_NAME={peer.module}", "-DTORCH_API_INCLUDE_EXTENSION_H", "-I", str(sources)]
    flags += [part for folder in includes for part in ("-isystem", folder)]

    def compile_one(unit: str) -> str:
        source, target, start = work / unit, work / f"{unit}.o", time.perf_counter()
        if target.exists() and source.read_text() == units[unit]:  # of a build that was cut short
            return ""
        source.write_text(units[unit])
        command = ["nvcc", *flags, "-c", str(source), "-o", f"{target}.partial"]
        with open(work / f"{unit}.log", "w") as log:
            failed = subprocess.run(command, check=False, stdout=log, stderr=log).returncode
        if not failed:
            os.replace(f"{target}.partial", target)
        seconds = time.perf_counter() - start
        print(f"{peer.name} {unit} {'failed' if failed else 'compiled'} in {seconds:.0f} s", flush=True)
        return unit if failed else ""

    with ThreadPoolExecutor(jobs) as pool:  # the long ones first
        failed = list(filter(None, pool.map(compile_one, sorted(units, key=lambda unit: "bwd" not in unit))))
    if failed:
        last = (work / f"{failed[0]}.log").read_text().strip().splitlines()[-12:]
        raise BuildError(f"{', '.join(failed)} did not compile; {work / failed[0]}.log ends:\n" + "\n".join(last))


def link(peer: Peer, units: Sequence[str], work: Path, out: Path) -> None:
    """The objects to an extension module in `out`."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    names = [n for n in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")
             if (libraries / f"lib{n}.so").exists()]  # fmt: skip
    module = out / f"{peer.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["nvcc", "-shared", *(f"{work / unit}.o" for unit in units), "-o", f"{module}.tmp", f"-L{libraries}"]
    done = subprocess.run([*command, *(f"-l{n}" for n in names)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{module.name} did not link: {done.stderr.strip()}")
    os.replace(f"{module}.tmp", module)


def copy_python(peer: Peer, source: Path, out: Path) -> None:
    """The Python files, in packages without the code that would import everything else."""
    for file in peer.python:
        target = out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        for package in target.relative_to(out).parents[:-1]:
            (out / package / "__init__.py").touch()
        shutil.copyfile(source / file, target)


def build(peer: Peer, sdists: Path, out: Path, architecture: str, jobs: int) -> None:
    """Builds one peer into `out` unless it is there."""
    if list(out.glob(f"{peer.module}*.so")):
        print(f"{peer.name}: {peer.module} is in {out} already", flush=True)
        return
    work = out / "build" / peer.name
    work.mkdir(parents=True, exist_ok=True)
    source = unpack(peer, sdists, work)
    sources = source / peer.sources
    units = mamba_units(sources) if peer is MAMBA else conv_units(sources)
    compile_units(peer, units, sources, work, architecture, jobs)
    copy_python(peer, source, out)
    link(peer, list(units), work, out)
    print(f"{peer.name}: {peer.module} is built", flush=True)


def visible_architecture() -> str:
    """90a for Hopper."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is visible to torch; give --architecture, 90a for Hopper")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdists", type=Path, required=True, help="folder with the .tar.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for PYTHONPATH")
    parser.add_argument("--only", choices=[MAMBA.name, CONV.name], help="default: both")
    parser.add_argument("--architecture", help="like 90a; default: the visible GPU's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: one per core)")
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on PATH")
    out, architecture = options.out.resolve(), options.architecture or visible_architecture()
    out.mkdir(parents=True, exist_ok=True)

    def succeeds(peer: Peer) -> bool:
        try:
            build(peer, options.sdists, out, architecture, options.jobs)
        except BuildError as error:
            print(f"{peer.name} could not be built: {error}", flush=True)
            return False
        return True

    peers = [peer for peer in (MAMBA, CONV) if options.only in (None, peer.name)]
    with ThreadPoolExecutor(len(peers)) as both:  # the longest units of one fill the cores the other leaves idle
        return int(not all(list(both.map(succeeds, peers))))


if __name__ == "__main__":
    sys.exit(main())
