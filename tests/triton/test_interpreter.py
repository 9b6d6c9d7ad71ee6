"""The Triton kernels run without a GPU: tests/triton/interpreted in a process of its own, under Triton's interpreter.

TRITON_INTERPRET is read when a kernel is decorated, and an interpreted kernel cannot be compiled, hence the process.
The interpreter computes in bfloat16 on the wrong bits (so kernels load, widen, compute, narrow), narrows float32 to
bfloat16 by truncation, and its runtime loops need numpy < 2.4 with triton 3.6.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreter_session(speed):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", speed, str(HERE / "interpreted")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # Not from the root: `python -m pytest` puts its folder on the path, and the root holds unbuilt sources.
    session = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE, env=environment)
    assert session.returncode == 0, session.stdout[-6000:] + session.stderr[-2000:]


def test_import_rom_imports_no_triton():
    code = "import torch, sys; before = set(sys.modules); import rom; print(*(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True).stdout
    assert "rom" in imported.split()
    assert not [m for m in imported.split() if m.split(".")[0] == "triton" or m.startswith("torch._dynamo")]
