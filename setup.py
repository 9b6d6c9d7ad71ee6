"""Build driver: setuptools -> CMake -> Ninja. Never imports torch; see CMakeLists.txt for what is built.

Environment
-----------
ROM_CUDA        auto (default): CUDA kernels if nvcc is found; on: fail without nvcc; off: CPU kernels only;
                pip: fetch a pinned nvcc from the package index into the isolated build environment.
ROM_CUDA_ARCHS  CMake's CUDA architectures, e.g. "90a-real". Default 80-real;90a-real;80-virtual.
MAX_JOBS        parallel compile jobs.
CMAKE_ARGS      further arguments for CMake.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA = os.environ.get("ROM_CUDA", "auto").lower()
# All five from one release: nvcc of 13.0 with the nvvm of a later one answers "Unsupported .version" from ptxas.
PIP_NVCC = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")]


def pip_nvcc_root() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(base) / "cu13"
        if (root / "bin" / "nvcc").exists():
            return root
    raise SystemExit(
        "ROM_CUDA=pip: the nvcc wheels are missing. Build with pip's build isolation on, or set ROM_CUDA=auto."
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != "rom._C":  # CMake builds both modules at once; the CUDA one may be missing (optional)
            return
        import pybind11

        if CUDA not in ("auto", "on", "off", "pip"):
            raise SystemExit(f"ROM_CUDA={CUDA}: expected auto, on, off or pip.")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent  # right for wheels and editable installs
        # One CMake cache per mode and Python; kept, so that a second build compiles only what changed.
        build = ROOT / "build" / f"cmake-{CUDA}-{sys.implementation.cache_tag}"
        if CUDA == "pip":
            shutil.rmtree(build, ignore_errors=True)  # its compiler lived in a build environment that pip has deleted
        for folder in (output, build):
            folder.mkdir(parents=True, exist_ok=True)
        installed = ROOT / "rom" if self.editable_mode else output
        for folder in (output, installed):
            for stale in folder.glob("_C*" + EXTENSION_SUFFIXES[0]):  # a CPU-only rebuild must not keep yesterday's
                stale.unlink()  # CUDA module
        for stub in (ROOT / "python").glob("*.pyi"):
            shutil.copy(stub, installed)

        env = dict(os.environ)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # never the cached path: pip deletes that environment
            f"-DROM_OUTPUT_DIR={output}",
            f"-DROM_CUDA={'ON' if CUDA == 'pip' else CUDA.upper()}",
        ]  # fmt: skip
        if CUDA == "pip":
            configure.append(f"-DCMAKE_CUDA_COMPILER={pip_nvcc_root() / 'bin' / 'nvcc'}")
            env["NVCC_APPEND_FLAGS"] = f"-L{pip_nvcc_root() / 'lib'}"  # the wheel has lib/, nvcc expects lib64/
        if archs := os.environ.get("ROM_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True, env=env)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", str(build), "--target", "all", *jobs], check=True, env=env)


setup(
    ext_modules=[Extension("rom._C", sources=[]), Extension("rom._C_cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=PIP_NVCC if CUDA == "pip" else [],
)
