"""Streams of moving digits without end: `python examples/streaming_digits [--quick] [--out runs/streaming_digits]`.

    per seed: teacher (flow matching, teacher forcing) -> its trajectories -> a few-step student -> endless rollouts
    then: report.md, report.json, streams.gif

A rollout is given its first frame, a real scan that no training saw; this frame alone hears its class. What comes later
knows the digit from the past: from the window, and from the sink, which is the first frame, for ever.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import report
from seed import run_seed
from training import QUICK, Settings


def run(settings: Settings, out: Path) -> None:
    """The whole program."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    # Seeds side by side, in processes of one thread: matmuls this small gain nothing from a second one.
    workers = min(settings.seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(run_seed, range(settings.seeds), [settings] * settings.seeds))
    report.write(out, asdict(settings), seeds, time.perf_counter() - began)
    videos = seeds[0]["videos"]
    report.animate(out / "streams.gif", {name: videos[name] for name in videos if not name.startswith("teacher")})
    print((out / "report.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="streaming_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/streaming_digits"))
    parser.add_argument("--quick", action="store_true", help="seconds: tries everything out and learns little")
    arguments = parser.parse_args()
    run(QUICK if arguments.quick else Settings(), arguments.out)


if __name__ == "__main__":
    main()
