"""Timing of candidates that take turns in one process; medians are compared.

On a GPU: CUDA events around work that is already queued.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

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

    def __post_init__(self) -> None:
        cuts = statistics.quantiles(self.samples, n=5)
        for name, value in (("median", statistics.median(self.samples)), ("p20", cuts[0]), ("p80", cuts[3])):
            object.__setattr__(self, name, value)

    def summary(self) -> dict[str, float | int]:
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "rounds": len(self.samples)}

    def over(self, other: Timing) -> Timing:
        """Ratios of the samples, round by round: a noisy moment hit both."""
        return Timing(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


def wall_clock(run: Callable[[], object]) -> float:
    """Milliseconds of one call, for code that is done when it returns."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
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
        self.device = device
        self.host: dict[Callable[[], object], float] = {}
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
    """For work that ends on the device: events on a GPU, the clock on a CPU."""
    return EventTimer(device) if device.type == "cuda" else wall_clock
