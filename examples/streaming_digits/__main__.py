"""Streams of moving digits without end: `python examples/streaming_digits [--quick] [--out runs/streaming_digits]`.

    teacher (flow matching, teacher forcing) -> its trajectories
    per seed: a few-step student -> endless rollouts of both
    report.md, report.json, streams.webp

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
import torch
from seed import make_teacher, run_seed
from training import QUICK, Settings


def run(settings: Settings, out: Path) -> None:
    """The whole program."""
    torch.set_num_threads(1)  # matmuls this small gain nothing from a second one: seeds run side by side instead
    began, cpu = time.perf_counter(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    losses = make_teacher(settings, out)
    cpu = time.process_time() - cpu
    workers = min(settings.seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(run_seed, range(settings.seeds), *([x] * settings.seeds for x in (settings, out))))
    report.write(out, asdict(settings), losses, seeds, (time.perf_counter() - began, cpu))
    videos = seeds[0]["videos"]
    report.animate(out / "streams.webp", {name: videos[name] for name in videos if not name.startswith("teacher")})
    print((out / "report.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="streaming_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/streaming_digits"))
    parser.add_argument("--quick", action="store_true", help="seconds: tries everything out and learns little")
    arguments = parser.parse_args()
    run(QUICK if arguments.quick else Settings(), arguments.out)


if __name__ == "__main__":
    main()
