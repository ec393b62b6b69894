"""FLOPs counted from the operations that run, beside the formulas, over models, steps, history layers and masks.

One count with history in all blocks and one in none tell every N: a block's FLOPs depend on its own attention only.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from ard.models.dit import DiT, DiTConfig
from ard.models.student import ARDStudent
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import flops as analytic
from benchmarks.baselines import published_student
from benchmarks.baselines.published_student import PublishedStudent
from testing.cases import MASKS

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
STEPS = range(2, 9)
PAPER_MASKS = ("M1", "M2", "M3", "M4")


def count(run: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """FLOPs of a call: in all, and by module."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops(), by_module


def inputs(config: DiTConfig, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (1, S, c, h, w) and labels on the meta device: shapes only."""
    states = torch.empty(1, steps, config.in_channels, *config.input_hw, device="meta")
    return states, torch.zeros(1, dtype=torch.int64, device="meta")


class Sampler(nn.Module):
    """Sampling as a module: the counter knows modules by their path from the outermost one that is called."""

    def __init__(self, student: ARDStudent):
        super().__init__()
        self.student = student

    def forward(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.student.sample(states[:, 0], labels)


def student_counts(config: DiTConfig, steps: int, history_layers: int, mask: str, way: str) -> tuple[int, list[int]]:
    """FLOPs of sampling or of one training forward: in all, and of each block."""
    window, sink = MASKS[mask]
    with torch.device("meta"):
        student = ARDStudent(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
    states, labels = inputs(config, steps)
    model, blocks = (
        (Sampler(student), "Sampler.student.blocks") if way == "sampling" else (student, "ARDStudent.blocks")
    )
    total, by_module = count(lambda: model(states, labels))
    return total, [by_module[f"{blocks}.{i}"] for i in range(config.depth)]


def compare_all(model: str, way: str) -> tuple[list[dict], list[dict], int]:
    """Rows for N = 0, 6 and depth; every case whose formula differs; how many cases there were."""
    config, rows, different, cases = DiTConfig.from_name(model), [], [], 0
    formula = analytic.student_sampling if way == "sampling" else analytic.student_forward
    for steps in STEPS:
        baseline = analytic.baseline_sampling(config, steps)
        none, without = student_counts(config, steps, 0, "M4", way)
        for mask in PAPER_MASKS:
            everywhere, reading = student_counts(config, steps, config.depth, mask, way)
            extra = [0, *itertools.accumulate(r - w for r, w in zip(reading, without, strict=True))]
            if none + extra[-1] != everywhere:
                raise RuntimeError(f"by block {none + extra[-1]} FLOPs were counted, in all {everywhere}")
            cases += len(extra)
            for N, more in enumerate(extra):
                entry = {"model": model, "work": way, "S": steps, "N": N, "mask": mask, "counted": none + more}
                entry["analytic"] = formula(config, steps, N, *MASKS[mask])
                entry["ratio"] = entry["counted"] / baseline
                if entry["counted"] != entry["analytic"]:
                    different.append(entry)
                if N in (0, 6, config.depth):
                    rows.append(entry)
    return rows, different, cases


def compare_models() -> tuple[list[dict], list[dict], int]:
    """`compare_all` of every model and way, on all cores."""
    rows, different, cases = [], [], 0
    work = [(model, way) for model in MODELS for way in ("training forward", "sampling")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(compare_all, *task) for task in reversed(work)]:  # the longest first
            found = future.result()
            rows, different, cases = found[0] + rows, found[1] + different, cases + found[2]
    return rows, different, cases


def design_table() -> list[dict]:
    """DiT-XL/2, S = 4, as README.md claims it; every count direct."""
    config, steps, N = DiTConfig.from_name("DiT-XL/2"), 4, 6
    with torch.device("meta"):
        teacher = DiT(config)
        published = PublishedStudent(ARDStudent(config, steps=steps, history_layers=N))
        t = torch.zeros(1)
    states, labels = inputs(config, steps)

    def student(history_layers: int, way: str) -> int:
        return student_counts(config, steps, history_layers, "M4", way)[0]

    sampling, forward = "sampling", "training forward"
    entries = [
        ("teacher, one forward", count(lambda: teacher(states[:, 0], t, labels))[0], analytic.teacher_forward(config)),
        ("student, N=0 (4 forwards)", student(0, sampling), analytic.baseline_sampling(config, steps)),
        ("student sampling, N=6", student(N, sampling), analytic.student_sampling(config, steps, N)),
        ("student training forward, N=6", student(N, forward), analytic.student_forward(config, steps, N)),
        ("student sampling, N=28", student(28, sampling), analytic.student_sampling(config, steps, 28)),
        (
            "published design, sampling, N=6",
            count(lambda: published.sample(states[:, 0], labels))[0],
            published_student.sampling_flops(config, steps, N),
        ),
        (
            "published design, training forward",
            count(lambda: published(states, labels))[0],
            published_student.training_flops(config, steps),
        ),
    ]
    baseline = analytic.baseline_sampling(config, steps)
    return [
        {"work": work, "counted": counted, "analytic": formula, "ratio": counted / baseline}
        for work, counted, formula in entries
    ]
