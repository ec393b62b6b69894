"""Timing on a GPU: CUDA events around work that is already queued, inputs rotated past the L2 cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from benchmarks.harness import wall_clock

Timer = Callable[[Callable[[], object]], float]
# Rough cycles per millisecond of a GPU's clock; only the length of the pause below depends on it.
CYCLES_PER_MS = 2_000_000


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
