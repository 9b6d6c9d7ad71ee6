"""What becomes of memory that tensors on the CPU have freed."""

from __future__ import annotations

import ctypes

# Parameters of mallopt() in glibc's <malloc.h>, and the most that it takes for the second on 64 bits.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_MAX = 32 << 20


def keep_freed() -> bool:
    """Keeps freed CPU memory in this process instead of giving it back to the system.

    glibc returns the top of its heap whenever much of it is free: every training step then gets its activations and
    gradients as fresh pages, each faulted in and zeroed by the kernel. Forward and backward of `selective_scan` at
    (1, 2048, 1536, 16) float32, one thread: 57 ms and 7,700 page faults before, 39 ms and none after (AMD EPYC, Zen 4,
    2026-11-22).

    In exchange the process stays as large as it ever was. A setting of the whole process, so it is yours to make:
    `rom train` and the benchmarks make it, `import rom` does not. Blocks over 32 MiB still come and go.

    Returns:
        Whether it took effect; False where the C library is not glibc.

    >>> kept = rom.memory.keep_freed()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: no handle to the process itself
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)) and bool(mallopt(_TRIM_THRESHOLD, -1))
