"""Timing: candidates take turns in one process, medians are compared.

On a GPU: CUDA events around work that is already queued, inputs rotated past the L2 cache.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# A dry run: tiny shapes, the GPU kernels on the CPU (interpreter, emulator); no time means anything.
TINY = os.environ.get("ARD_BENCH_TINY") == "1"
Timer = Callable[[Callable[[], object]], float]
# Rough cycles per millisecond of a GPU's clock; only the length of the pause below depends on it.
CYCLES_PER_MS = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate, a sample per round."""

    samples: tuple[float, ...]
    median: float = field(init=False)
    p20: float = field(init=False)
    p80: float = field(init=False)

    def __post_init__(self):
        cuts = statistics.quantiles(self.samples, n=5)
        for name, value in (("median", statistics.median(self.samples)), ("p20", cuts[0]), ("p80", cuts[3])):
            object.__setattr__(self, name, value)

    def summary(self) -> dict[str, float | int]:
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "rounds": len(self.samples)}

    def over(self, other: Timing) -> Timing:
        """Ratios of the samples, round by round: a noisy moment hit both."""
        return Timing(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the system, for every candidate alike.

    Otherwise each fresh 19 MB output costs some thousand page faults, more than the kernels under test, and whether it
    does depends on what ran before. (On a GPU PyTorch's caching allocator does the same.)
    """
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 28), (M_MMAP_THRESHOLD, 1 << 25)):
        libc.mallopt(option, value)


def wall_clock(run: Callable[[], object]) -> float:
    """Milliseconds of one call, for code that is done when it returns."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    candidates: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    *,
    timer: Timer = wall_clock,
    seconds: float = float("inf"),
    least: int = 5,
) -> dict[str, Timing]:
    """Time every candidate `repeats` times, taking turns, so that a noisy neighbour hits all of them alike.

    The order is drawn anew in every round: a fixed one gives each candidate the caches its predecessor left.
    `timer` runs a candidate and returns milliseconds. No round starts after `seconds`, but `least` are always timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw, begin = list(candidates.items()), random.Random(0), time.monotonic()
    for repeat in range(warmup + repeats):
        if repeat >= warmup + least and time.monotonic() - begin > seconds:
            break
        draw.shuffle(order)
        for name, run in order:
            elapsed = timer(run)
            if repeat >= warmup:
                samples[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


class EventTimer:
    """Milliseconds the GPU takes for a call.

    The GPU first idles, busy waiting, for longer than the host needs to queue the call: so the events enclose the
    kernels, and not the time Python takes to launch them. What the host needs is in `host`, per candidate.
    """

    def __init__(self, device: torch.device):
        self.device, self.host = device, {}
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int((0.2 + 1.5 * self.host.get(run, 5.0)) * CYCLES_PER_MS))
        begin = time.perf_counter()
        self.start.record()
        run()
        self.stop.record()
        host = (time.perf_counter() - begin) * 1e3
        # The first calls compile; later ones are what the next pause must cover.
        self.host[run] = min(20.0, host)
        torch.cuda.synchronize(self.device)
        return self.start.elapsed_time(self.stop)


def make_timer(device: torch.device) -> Timer:
    return EventTimer(device) if device.type == "cuda" else wall_clock


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
