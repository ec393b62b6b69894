"""Timing and result files: candidates take turns in one process, medians are compared, every row says where it ran."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

import ard_kernels

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate."""

    median: float
    p20: float
    p80: float


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
    timer: Callable[[Callable[[], object]], float] = wall_clock,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Time every candidate `repeats` times, taking turns, so that a noisy neighbour hits all of them alike.

    The order is drawn anew in every round: a fixed one gives each candidate the caches its predecessor left.
    `timer` runs a candidate and returns milliseconds. No round starts after `seconds`, but five are always timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw, begin = list(candidates.items()), random.Random(0), time.monotonic()
    for repeat in range(warmup + repeats):
        if repeat >= warmup + 5 and time.monotonic() - begin > seconds:
            break
        draw.shuffle(order)
        for name, run in order:
            elapsed = timer(run)
            if repeat >= warmup:
                samples[name].append(elapsed)
    timings = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=5)
        timings[name] = Timing(statistics.median(values), cuts[0], cuts[3])
    return timings


def row(
    op: str, shape: str, direction: str, timings: dict[str, Timing], ours: str, peers: list[str], target: float, **facts
) -> dict:
    """One result: ours against the fastest of `peers`; `target` is the least ratio peer / ours that counts as done.

    Without a peer (all refused) there is no ratio, and the target is not met. `facts` are added, or replace entries.
    """
    best = min(peers, key=lambda name: timings[name].median, default=None)
    ratio = timings[best].median / timings[ours].median if best else None
    return {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "direction": direction,
        "milliseconds": {name: asdict(timing) for name, timing in timings.items()},
        "ours": ours,
        "best_peer": best,
        "ratio": ratio,
        "target": target,
        "met": ratio is not None and ratio >= target,
        **facts,
    }


def print_rows(rows: list[dict]) -> None:
    for r in rows:
        times = "  ".join(f"{name} {t['median']:.3f}" for name, t in r["milliseconds"].items())
        verdict = "met" if r["met"] else "MISSED"
        print(f"{r['op']} {r['shape']} {r['direction']}: {r['ratio']:.3f}x of {r['best_peer']} "
              f"(target {r['target']:.3f}, {verdict})  [ms] {times}")  # fmt: skip


def cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match.group(1) if match else platform.processor()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _git(*arguments: str) -> str:
    """Output of a git command; empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def environment(device: str | None = None) -> dict:
    """Where a result comes from; `device` in words, default this CPU.

    A copy without its repository takes the commit from the variable ARD_COMMIT; whether it is dirty is unknown then.
    """
    commit = _git("rev-parse", "HEAD")
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"))
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "date": date.today().isoformat(),
        "commit": commit or os.environ.get("ARD_COMMIT", "unknown"),
        "dirty": dirty if commit else None,
        "device": device or cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ard_kernels": ard_kernels.__version__,
    }


def write_results(name: str, rows: list[dict]) -> Path:
    """benchmarks/results/<device>/<name>.json"""
    path = RESULTS / slug(f"{cpu_name()} {torch.get_num_threads()} threads") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path
