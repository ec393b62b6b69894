"""Beside ard_kernels/tune/timing.py: on which device, on inputs rotated past the L2 cache, below which ceilings."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable

import torch

from ard_kernels.tune.timing import Timer, interleaved, make_timer, wall_clock

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# A dry run: tiny shapes, the GPU kernels on the CPU (interpreter, emulator); no time means anything.
TINY = os.environ.get("ARD_BENCH_TINY") == "1"


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the system, for every candidate alike.

    Otherwise each fresh 19 MB output costs some thousand page faults, more than the kernels under test, and whether it
    does depends on what ran before. (On a GPU PyTorch's caching allocator does the same.)
    """
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 28), (M_MMAP_THRESHOLD, 1 << 25)):
        libc.mallopt(option, value)


def give_back_freed_memory() -> None:
    """Have glibc return all freed blocks to the system: the next tensors lie in memory without pages."""
    ctypes.CDLL(None).malloc_trim(0)


def fresh_wall_clock(run: Callable[[], object]) -> float:
    """Milliseconds of one call on the CPU that finds no memory kept for what it allocates."""
    give_back_freed_memory()
    return wall_clock(run)


def wall_timer(device: torch.device) -> Timer:
    """Milliseconds from the call until the device is done, launches included: what a user waits for."""

    def timed(run: Callable[[], object]) -> float:
        def whole():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return wall_clock(whole)

    return timed


def sets_needed(device: torch.device, nbytes: int) -> int:
    """How many input sets of `nbytes` to rotate, so that together they are more than twice the L2 cache; 2 to 16."""
    if device.type != "cuda":
        return 2
    L2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, -(-2 * L2 // nbytes) + 1))


def rotating(function: Callable, sets: list) -> Callable[[], object]:
    """A call without arguments that hands `function` the next of `sets` each time."""
    turn = itertools.cycle(sets)
    return lambda: function(*next(turn))


def ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """GB/s of a copy, read + written (2 GiB each way), and TFLOP/s of a bf16 matmul (8192^3, random data)."""
    elements, n = (1 << 31, 8192) if device.type == "cuda" else (1 << 12, 32)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    timings = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, repeats, timer=make_timer(device)
    )
    return {"GB/s": 2 * elements / timings["copy"].median / 1e6, "TFLOP/s": 2 * n**3 / timings["matmul"].median / 1e9}
