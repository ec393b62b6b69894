"""What the demos share: time per stage, trajectories of a teacher, the students of a seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
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


def make_trajectories(made: Made, out: Path, watch: Stopwatch) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings, and checks its hashes."""
    spec = stages.store_spec(made.recipe, made.sha256, stages.source_of(made.recipe))
    folder = out / "trajectories" / spec.fingerprint()
    with watch.stage("trajectories", made.recipe.trajectories.count) as advance:
        store = stages.make_trajectories(made.recipe, made.teacher, made.sha256, folder, on_progress=advance)
        store.verify()
    return store


def make_students(
    made: Made, store: TrajectoryStore, real: RealLatents, seed: int, config: DemoConfig, out: Path, watch: Stopwatch
) -> list[Sampler]:
    """The averaged students of one seed, in eval mode: one per history_layers, and the last one fine-tuned."""
    teacher, teacher_sha256, recipe = made.teacher, made.sha256, made.recipe
    samplers = []
    recipe = replace(recipe, distill=replace(recipe.distill, seed=seed))
    assert recipe.gan is not None  # of a DemoConfig
    gan = replace(recipe.gan, train=replace(recipe.gan.train, seed=seed))
    recipe = replace(recipe, gan=gan)
    for layers in config.demo.history_layers:
        recipe = replace(recipe, student=replace(recipe.student, history_layers=layers))
        name, folder = f"N={layers}", out / f"student-n{layers}-seed{seed}"
        with watch.training(f"student {name} seed {seed}", recipe.distill.steps) as on_step:
            student, fitted = stages.distill(
                recipe, teacher, teacher_sha256, store, folder, resume=False, on_step=on_step
            )
        samplers.append(Sampler(name, layers, seed, averaged(student, fitted), fitted.log))
    name = f"{name} + GAN"
    with watch.training(f"student {name} seed {seed}", gan.train.steps) as on_step:
        tuned, fitted = stages.finetune(
            recipe,
            copy.deepcopy(student),
            open_source(folder).sha256,
            teacher,
            teacher_sha256,
            store,
            real,
            out / f"student-n{layers}-gan-seed{seed}",
            resume=False,
            on_step=on_step,
        )
    return [*samplers, Sampler(name, layers, seed, averaged(tuned, fitted), fitted.log)]
