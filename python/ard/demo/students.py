"""What the demos share: time per stage, trajectories of a teacher, the students of a seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ard.common.progress import counted, progress_bar
from ard.conditions.sources import null_tensors
from ard.config.recipe import Recipe
from ard.data.latents import RealLatents
from ard.data.trajectories import MakeBatch, TrajectoryStore, generate_store
from ard.demo.settings import DemoConfig
from ard.demo.workers import Started, Workers, report
from ard.diffusion.trajectories import TrajectoryBatch
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher
from ard.training import stages
from ard.training.trainer import Fitted
from ard.weights.opened import open_source

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class Stopwatch:
    """Seconds per stage, and its progress while it runs."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields advance(n=1)."""
        start = time.perf_counter()
        with progress_bar(name, total) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def training(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function of the updates done."""
        with self.stage(name, total) as advance:
            yield counted(advance)


@dataclass
class Made:
    """A subject's frozen teacher, and the recipe with what was made beside it: a store of prompts."""

    teacher: Teacher
    sha256: str  # of its weights
    log: list[dict]
    recipe: Recipe


@dataclass
class Sampler:
    """One row of the report: a student of one seed."""

    name: str
    history_layers: int
    seed: int
    student: ARDStudent
    log: list[dict]


def averaged(model: Model, fitted: Fitted) -> Model:
    return fitted.ema.copy_to(model).eval().requires_grad_(False)


PART = 250  # samples of a worker's turn


def teacher_sampler(made: Made, keep: tuple[int, ...]) -> MakeBatch:
    """(noise, *conditions) -> the teacher's trajectories at ``keep``."""
    null = null_tensors(stages.source_of(made.recipe), made.recipe.trajectories.negative_prompt)
    return stages.sampler(made.teacher, made.recipe.trajectories, keep, torch.device("cpu"), null)


def start_sampling(
    made: Made, keep: tuple[int, ...], inputs: tuple[Tensor, ...], workers: Workers
) -> Started[tuple[Tensor, Tensor]]:
    """`teacher_sampler` of (noise, *conditions), by workers: a part each, of the same rows however many they are."""
    parts = list(zip(*(tensor.split(PART) for tensor in inputs), strict=True))
    return workers.start(partial(_sampled, made, keep), parts)


def shared_sampler(made: Made, keep: tuple[int, ...], workers: Workers) -> MakeBatch:
    """`teacher_sampler`, by workers."""

    def sample(*inputs: Tensor) -> TrajectoryBatch:
        states = workers.finish(start_sampling(made, keep, inputs, workers))
        x0, ode = (torch.cat(tensors) for tensors in zip(*states, strict=True))
        return TrajectoryBatch(inputs[0], x0, ode, inputs[1:])

    return sample


def _sampled(made: Made, keep: tuple[int, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The states x0 and ode, in a worker."""
    sample, rows = teacher_sampler(made, keep), made.recipe.trajectories.batch_size
    batches = [sample(*batch) for batch in zip(*(tensor.split(rows) for tensor in inputs), strict=True)]
    return torch.cat([batch.x0 for batch in batches]), torch.cat([batch.ode for batch in batches])


def make_trajectories(made: Made, out: Path, watch: Stopwatch, workers: Workers) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings, and checks its hashes."""
    recipe, source = made.recipe, stages.source_of(made.recipe)
    spec = stages.store_spec(recipe, made.sha256, source)
    folder = out / "trajectories" / spec.fingerprint()
    with watch.stage("trajectories", spec.count) as advance:
        store = generate_store(
            folder,
            spec,
            shared_sampler(made, recipe.trajectories.keep, workers),
            source=source,
            batch_size=spec.shard_size,
            on_progress=advance,
        )
        store.verify()
    return store


def student_jobs(made: Made, store: TrajectoryStore, real: RealLatents, config: DemoConfig, out: Path) -> list[Job]:
    """Of every seed a student per history_layers, the last of which is fine-tuned too."""
    seeds, layers = config.demo.seeds, config.demo.history_layers
    return [Job(made, store.folder, real, seed, n, n == layers[-1], out) for seed in seeds for n in layers]


@dataclass(frozen=True)
class Job:
    """A student of one seed and so many history layers; and, if ``tune``, its fine-tune."""

    made: Made
    trajectories: Path
    real: RealLatents
    seed: int
    layers: int
    tune: bool
    out: Path

    @property
    def steps(self) -> int:
        recipe = self.made.recipe
        assert recipe.gan is not None  # of a DemoConfig
        return recipe.distill.steps + (recipe.gan.train.steps if self.tune else 0)

    def run(self) -> list[Sampler]:
        """The averaged students, in eval mode; in a worker."""
        teacher, teacher_sha256, recipe = self.made.teacher, self.made.sha256, self.made.recipe
        seed, layers, name = self.seed, self.layers, f"N={self.layers}"
        assert recipe.gan is not None  # of a DemoConfig
        gan = replace(recipe.gan, train=replace(recipe.gan.train, seed=seed))
        recipe = replace(recipe, distill=replace(recipe.distill, seed=seed), gan=gan)
        recipe = replace(recipe, student=replace(recipe.student, history_layers=layers))
        store = TrajectoryStore(self.trajectories, stages.source_of(recipe))
        folder = self.out / f"student-n{layers}-seed{seed}"
        student, fitted = stages.distill(
            recipe, teacher, teacher_sha256, store, folder, resume=False, on_step=counted(report)
        )
        samplers = [Sampler(name, layers, seed, averaged(student, fitted), fitted.log)]
        if not self.tune:
            return samplers
        tuned, fitted = stages.finetune(
            recipe,
            copy.deepcopy(student),
            open_source(folder).sha256,
            teacher,
            teacher_sha256,
            store,
            self.real,
            self.out / f"student-n{layers}-gan-seed{seed}",
            resume=False,
            on_step=counted(report),
        )
        return [*samplers, Sampler(f"{name} + GAN", layers, seed, averaged(tuned, fitted), fitted.log)]
