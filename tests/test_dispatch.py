"""Which GPUs the CUDA kernels are kept away from."""

from types import SimpleNamespace

import pytest
import torch

from rom import dispatch, native

HOPPER = SimpleNamespace(name="H200", major=9, minor=0, shared_memory_per_block_optin=227 << 10)
ADA = SimpleNamespace(name="RTX 4090", major=8, minor=9, shared_memory_per_block_optin=99 << 10)
TURING = SimpleNamespace(name="T4", major=7, minor=5, shared_memory_per_block_optin=64 << 10)


@pytest.mark.parametrize(
    "gpus, shared_bytes, reason",
    [
        ([HOPPER], 129 << 10, ""),
        ([ADA], 0, ""),
        ([HOPPER, ADA], 129 << 10, "RTX 4090 has 99 KiB of shared memory per block, the kernels need 129"),
        ([TURING], 0, "T4 has compute capability 7.5, the kernels are built for 8.0 and later"),
        ([], 1, ""),
    ],
)
def test_gpus_that_are_too_small(monkeypatch, gpus, shared_bytes, reason):
    monkeypatch.setattr(native, "CUDA_REASON", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    assert dispatch._no_cuda(shared_bytes) == reason


def test_the_scan_declares_its_shared_memory():
    assert dispatch.implementation("selective_scan", "cuda").shared_bytes == 129 << 10
    assert dispatch.implementation("selective_scan", "cpu").shared_bytes == 0
