"""Freed memory stays, or the C library is another one. In a process of its own: the setting is the process's."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch, rom
kept = rom.memory.keep_freed() if sys.argv[1] == "keep" else False
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    tensors = [torch.ones(2 << 20) for _ in range(6)]  # 8 MiB each, and all freed at the end
for _ in range(5):
    step()
before = faults()
for _ in range(10):
    step()
print(kept, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_page_faults(tmp_path):
    def run(how):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
        # glibc's initial threshold, held there: every tensor is mapped and unmapped. Left to itself glibc raises it,
        # and whether it then trims its heap depends on what happens to lie at the top.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        return kept, int(faults)

    assert run("leave")[1] > 10 * 1000  # 48 MiB a step are 12,288 pages of 4 KiB: most of them come back, each step
    kept, faults = run("keep")
    assert kept == "True" and faults < 100


def test_another_c_library_is_left_alone(monkeypatch):
    import ctypes

    from rom import memory

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False
