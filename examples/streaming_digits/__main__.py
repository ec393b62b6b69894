"""Streams of moving digits without end: `python examples/streaming_digits [--quick] [--out runs/streaming_digits]`.

    teacher (flow matching, teacher forcing) -> its trajectories
    per seed: a few-step student; endless rollouts of both
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
from functools import partial
from pathlib import Path

import report
import seed as jobs
import torch
from training import QUICK, Settings


def run(settings: Settings, out: Path) -> None:
    """The whole program."""
    torch.set_num_threads(1)  # matmuls this small gain nothing from a second one: seeds run side by side instead
    began, cpu = time.perf_counter(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    losses = jobs.make_teacher(settings, out)
    cpu = time.process_time() - cpu
    work = [(model, seed) for model in ("student", "teacher") for seed in range(settings.seeds)]  # the longest first
    with ProcessPoolExecutor(os.cpu_count() or 1, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(partial(jobs.run, settings=settings, folder=out), *zip(*work, strict=True))
        made = dict(zip(work, found, strict=True))
    seeds = [joined(made["teacher", seed], made["student", seed]) for seed in range(settings.seeds)]
    report.write(out, asdict(settings), losses, seeds, (time.perf_counter() - began, cpu))
    videos = seeds[0]["videos"]
    report.animate(out / "streams.webp", {name: videos[name] for name in videos if not name.startswith("teacher")})
    print((out / "report.md").read_text())


def joined(teacher: dict, student: dict) -> dict:
    """What the two jobs of a seed have found."""
    both = {name: teacher[name] + student[name] for name in ("rows", "losses", "cpu_seconds")}
    return student | both | {"videos": teacher["videos"] | student["videos"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="streaming_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/streaming_digits"))
    parser.add_argument("--quick", action="store_true", help="seconds: tries everything out and learns little")
    arguments = parser.parse_args()
    run(QUICK if arguments.quick else Settings(), arguments.out)


if __name__ == "__main__":
    main()
