"""Scores of the demo's samplers from noise that no training saw, and what an image costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ard.common.streams import noise_at
from ard.data.latents import RealLatents
from ard.demo.settings import DemoConfig
from ard.demo.students import Made, Sampler, Stopwatch, start_sampling, teacher_sampler
from ard.demo.workers import Workers, report
from ard.evaluation.metrics import FeatureStatistics, endpoint_mse, feature_statistics, frechet_distance
from ard.models.student import ARDStudent
from ard_kernels import flops

DISTANCES = ("frechet_to_teacher", "endpoint_mse", "frechet_to_real")  # the smaller the better; other scores are shares
FACTS = ("sampler", "history_layers", "seed")  # of a row, besides its scores
TEACHERS_TURN = 5  # a sampling of the teacher takes as long as ten of a student


class Subject(Protocol):
    """What a demo shows: single digits by label, or scenes by prompt.

    real_images: what distances to real ones are measured to. captions: of the evaluated images, (count,).
    """

    name: str
    real_images: Tensor
    captions: list[str]

    def make_teacher(self, out: Path, watch: Stopwatch) -> Made:
        """Trains it; everything below may be asked for after that only."""

    def real(self) -> RealLatents:
        """What the fine-tune compares with."""

    def conditions(self, count: int) -> tuple[Tensor, ...]:
        """The model's conditions of the first ``count`` evaluated images."""

    def features(self, images: Tensor) -> Tensor:
        """Rows (m, F) whose Gaussians are compared."""

    def shares(self, images: Tensor) -> dict[str, float]:
        """Of all evaluated images, the shares that show what they should."""


class Judge:
    """Scores samplers on one set of held-out noise; the teacher's images from it are the reference.

    Workers make these behind what they were given before.
    """

    def __init__(self, made: Made, subject: Subject, config: DemoConfig, watch: Stopwatch, workers: Workers):
        settings = config.demo.evaluation
        self.subject, self.watch, self.workers, self.batch_size = subject, watch, workers, settings.batch_size
        noise = noise_at(settings.seed, range(settings.count), made.recipe.model.image_shape)
        self.inputs = (noise, *subject.conditions(settings.count))
        self.sampling = start_sampling(made, (0,), self.inputs, workers)
        self.real = self.statistics(subject.real_images)

    @cached_property
    def teacher_images(self) -> Tensor:
        with self.watch.stage("teacher's images", len(self.inputs[0])) as advance:
            images = torch.cat([x0[:, -1] for x0, _ in self.workers.finish(self.sampling)])
            advance(len(images))
        return images

    @cached_property
    def teacher(self) -> FeatureStatistics:
        return self.statistics(self.teacher_images)

    def statistics(self, images: Tensor) -> FeatureStatistics:
        return feature_statistics(self.subject.features(images))

    def images(self, samplers: Sequence[Sampler]) -> list[Tensor]:
        """Of all held-out noise, by each sampler."""
        with self.watch.stage("students' images", len(samplers) * len(self.inputs[0])) as advance:
            students = [sampler.student for sampler in samplers]
            return self.workers.run(partial(_sampled, self.inputs, self.batch_size), students, advance)

    def scores(self, images: Tensor) -> dict[str, float]:
        distance = frechet_distance(self.statistics(images), self.real)
        return {"frechet_to_real": distance, **self.subject.shares(images)}

    def row(self, sampler: Sampler, images: Tensor) -> dict[str, Any]:
        return {
            "sampler": sampler.name,
            "history_layers": sampler.history_layers,
            "seed": sampler.seed,
            "frechet_to_teacher": frechet_distance(self.statistics(images), self.teacher),
            "endpoint_mse": endpoint_mse(images, self.teacher_images),
            **self.scores(images),
        }


def _sampled(inputs: tuple[Tensor, ...], batch_size: int, student: ARDStudent) -> Tensor:
    """In a worker."""
    images = []
    for batch in zip(*(tensor.split(batch_size) for tensor in inputs), strict=True):
        images.append(student.sample(*batch)[:, -1])
        report(len(batch[0]))
    return torch.cat(images)


def is_tuned(name: str) -> bool:
    """Whether a sampler's name is of a fine-tuned one."""
    return name.endswith(" + GAN")


def summarize(rows: Sequence[dict]) -> dict:
    """Per sampler: mean, min, max of each score over seeds; and, seed by seed, how many times smaller a distance is and
    how much larger a share.

    A student with history is compared with the first one, a fine-tuned one with the one it started from.
    """
    metrics = [name for name in rows[0] if name not in FACTS]
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["sampler"], []).append(row)

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}

    first, smaller, larger = next(iter(by_name)), {}, {}
    for name, own in by_name.items():
        other = name.removesuffix(" + GAN") if is_tuned(name) else first
        if name != other:
            pairs = list(zip(by_name[other], own, strict=True))
            ratios = {metric: spread([base[metric] / row[metric] for base, row in pairs]) for metric in DISTANCES}
            shares = [metric for metric in metrics if metric not in DISTANCES]
            gains = {metric: spread([row[metric] - base[metric] for base, row in pairs]) for metric in shares}
            smaller[name], larger[name] = {"over": other, **ratios}, {"over": other, **gains}
    scores = {
        name: {metric: spread([row[metric] for row in own]) for metric in metrics} for name, own in by_name.items()
    }
    return {"scores": scores, "times_smaller": smaller, "larger_by": larger}


def measure_costs(
    made: Made, subject: Subject, samplers: Sequence[Sampler], config: DemoConfig, watch: Stopwatch
) -> list[dict]:
    """FLOPs (analytic) and seconds per image of each sampler, medians over turns, the teacher in every fifth.

    "times_baseline": of the time of the first student, without history, in the same turn: the median, too. A shared
    machine is twice as slow in one minute as in the next.
    """
    settings, trajectories, model = config.demo.evaluation, made.recipe.trajectories, made.recipe.model
    noise = noise_at(settings.seed, range(settings.timing_batch_size), model.image_shape)
    inputs = (noise, *subject.conditions(settings.timing_batch_size))
    forwards = trajectories.sampling_steps * (1 if trajectories.cfg_scale == 1.0 else 2)
    # name, history layers, (noise, *conditions) -> samples, FLOPs of an image
    runs: list[tuple[str, int | None, Callable[..., object], int]]
    runs = [("teacher", None, teacher_sampler(made, (0,)), forwards * flops.teacher_forward(model))]
    for sampler in samplers[: len(config.demo.history_layers)]:  # a fine-tune changes no cost
        n = sampler.history_layers
        cost = flops.student_sampling(model, made.recipe.steps, n)
        student, cache = sampler.student, sampler.student.new_cache(settings.timing_batch_size)
        runs.append((f"student N={n}", n, partial(student.sample, cache=cache), cost))
    times: dict[str, dict[int, float]] = {name: {} for name, *_ in runs}  # by turn
    with watch.stage("timing", settings.timing_repeats) as advance:
        for turn in range(settings.timing_repeats):
            for name, layers, run, _ in runs:
                if layers is None and turn % TEACHERS_TURN:
                    continue
                start = time.perf_counter()
                run(*inputs)
                times[name][turn] = time.perf_counter() - start
            advance()
    baseline = times[runs[1][0]]
    return [
        {
            "sampler": name,
            "history_layers": n,
            "flops": cost,
            "seconds": statistics.median(times[name].values()) / settings.timing_batch_size,
            "times_baseline": statistics.median(spent / baseline[turn] for turn, spent in times[name].items()),
        }
        for name, n, _, cost in runs
    ]
