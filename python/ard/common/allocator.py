"""What malloc does with memory that tensors on the CPU have freed."""

from __future__ import annotations

import ctypes
import os

KEPT = 256 << 20  # bytes

USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep up to `KEPT` bytes for the next tensors, and return whether it does.

    By itself it returns the end of its heap to the system once twice the largest block is free there, and touching
    fresh memory costs a page fault every 4 KiB: a quarter of a small model's time to sample, a twentieth to train. Left
    alone where the environment says how malloc works, and where it is not glibc's.
    """
    if any(name in os.environ for name in USERS):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl; macOS; Windows
        return False
    return all([set_option(option, KEPT) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD)])
