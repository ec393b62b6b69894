"""What the demos share: time per stage, trajectories of a teacher, the students of a seed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ard.common.progress import counted, progress_bar
from ard.config.recipe import Recipe
from ard.data.latents import RealLatents
from ard.data.trajectories import TrajectoryStore
from ard.demo.settings import DemoConfig
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
    shown: bool = True

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields advance(n=1)."""
        start = time.perf_counter()
        with progress_bar(name, total, self.shown) as advance:
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


def make_trajectories(made: Made, out: Path, watch: Stopwatch) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings, and checks its hashes."""
    spec = stages.store_spec(made.recipe, made.sha256, stages.source_of(made.recipe))
    folder = out / "trajectories" / spec.fingerprint()
    with watch.stage("trajectories", made.recipe.trajectories.count) as advance:
        store = stages.make_trajectories(made.recipe, made.teacher, made.sha256, folder, on_progress=advance)
        store.verify()
    return store


def make_students(
    made: Made, store: TrajectoryStore, real: RealLatents, config: DemoConfig, out: Path, watch: Stopwatch
) -> list[Sampler]:
    """The averaged students of every seed, in eval mode: one per history_layers, and the last one fine-tuned.

    With several workers they are trained side by side, in processes of one thread each: which of them trains what, and
    how many there are beyond one, changes no bit.
    """
    seeds, layers = config.demo.seeds, config.demo.history_layers
    jobs = [Job(made, store.folder, real, seed, n, n == layers[-1], config, out) for seed in seeds for n in layers]
    if config.demo.workers == 1:
        return [sampler for job in jobs for sampler in job.run(watch, store)]
    longest_first = sorted(range(len(jobs)), key=lambda number: -jobs[number].steps)
    context = multiprocessing.get_context("spawn")
    total, made_by_job = sum(job.steps for job in jobs), {}
    with watch.stage("students", total) as advance, ProcessPoolExecutor(config.demo.workers, context, _begin) as pool:
        futures = {pool.submit(_run_alone, jobs[number]): number for number in longest_first}
        for future in as_completed(futures):
            made_by_job[futures[future]] = future.result()
            advance(jobs[futures[future]].steps)
    return [sampler for number in range(len(jobs)) for sampler in made_by_job[number]]


@dataclass(frozen=True)
class Job:
    """A student of one seed and so many history layers; and, if ``tune``, its fine-tune."""

    made: Made
    trajectories: Path
    real: RealLatents
    seed: int
    layers: int
    tune: bool
    config: DemoConfig
    out: Path

    @property
    def steps(self) -> int:
        recipe = self.made.recipe
        assert recipe.gan is not None  # of a DemoConfig
        return recipe.distill.steps + (recipe.gan.train.steps if self.tune else 0)

    def run(self, watch: Stopwatch, store: TrajectoryStore) -> list[Sampler]:
        teacher, teacher_sha256, recipe = self.made.teacher, self.made.sha256, self.made.recipe
        seed, layers, name = self.seed, self.layers, f"N={self.layers}"
        assert recipe.gan is not None  # of a DemoConfig
        gan = replace(recipe.gan, train=replace(recipe.gan.train, seed=seed))
        recipe = replace(recipe, distill=replace(recipe.distill, seed=seed), gan=gan)
        recipe = replace(recipe, student=replace(recipe.student, history_layers=layers))
        folder = self.out / f"student-n{layers}-seed{seed}"
        with watch.training(f"student {name} seed {seed}", recipe.distill.steps) as on_step:
            student, fitted = stages.distill(
                recipe, teacher, teacher_sha256, store, folder, resume=False, on_step=on_step
            )
        samplers = [Sampler(name, layers, seed, averaged(student, fitted), fitted.log)]
        if not self.tune:
            return samplers
        name = f"{name} + GAN"
        with watch.training(f"student {name} seed {seed}", gan.train.steps) as on_step:
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
                on_step=on_step,
            )
        return [*samplers, Sampler(name, layers, seed, averaged(tuned, fitted), fitted.log)]


def _begin() -> None:
    """A worker has one thread, as two that wait for each other would take a core each; and it ends with its parent,
    which a pool's workers outlive if that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run_alone(job: Job) -> list[Sampler]:
    """In a worker."""
    store = TrajectoryStore(job.trajectories, stages.source_of(job.made.recipe))
    return job.run(Stopwatch(shown=False), store)
