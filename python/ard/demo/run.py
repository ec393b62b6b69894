"""`ard demo`: the whole method on real digits, from a teacher to scored students, in one folder.

    classifier -> teacher -> trajectories -> students with and without history -> GAN fine-tune -> samples -> report

The students of one seed start from the same weights (the teacher's) and see the same batches in the same order for the
same number of steps; they differ in the number of layers that read the history, and in nothing else. Zero layers is
plain step distillation. The one with most history is then fine-tuned against the real digits.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ard.common.progress import counted, progress_bar
from ard.common.settings import COUNT, SEED, Ranged, build, merge
from ard.common.streams import noise_at
from ard.config.recipe import Recipe, plain, read_values
from ard.config.sections import PreviewConfig
from ard.data import digits
from ard.data.latents import LatentsInMemory
from ard.data.trajectories import TrajectoryStore
from ard.demo import report
from ard.evaluation import digit_classifier
from ard.evaluation.digit_classifier import ClassifierConfig, DigitClassifier
from ard.evaluation.metrics import (
    FeatureStatistics,
    class_consistency,
    endpoint_mse,
    feature_statistics,
    frechet_distance,
)
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher
from ard.storage.files import write_json
from ard.training import stages
from ard.training.trainer import Fitted
from ard.weights.opened import open_source
from ard_kernels import flops

Model = TypeVar("Model", bound=torch.nn.Module)
RECIPES = {"dit": "digits", "sit": "digits_sit"}  # family -> shipped recipe


@dataclass(frozen=True)
class EvaluationConfig(Ranged):
    count: int  # images per sampler
    batch_size: int
    seed: int  # of the held-out noise
    timing_batch_size: int
    timing_repeats: int

    RANGES: ClassVar = {
        "count": COUNT,
        "batch_size": "[1, 65536]",
        "seed": SEED,
        "timing_batch_size": "[1, 65536]",
        "timing_repeats": COUNT,
    }


@dataclass(frozen=True)
class ComparisonConfig(Ranged):
    classifier: ClassifierConfig
    history_layers: tuple[int, ...]  # one student each; the first, 0, is the baseline, the last is fine-tuned
    seeds: tuple[int, ...]  # of the data order; replace those of the recipe's training
    evaluation: EvaluationConfig

    RANGES: ClassVar = {"history_layers": "[0, 1024]", "seeds": SEED}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.history_layers) < 2 or self.history_layers[0] != 0:
            raise ValueError(f"demo.history_layers is {list(self.history_layers)}; expected 0 first, then others")
        if not self.seeds:
            raise ValueError("demo.seeds is empty; expected at least one seed")


@dataclass(frozen=True)
class DemoConfig:
    recipe: Recipe
    demo: ComparisonConfig

    def __post_init__(self) -> None:
        if self.demo.evaluation.seed == self.recipe.trajectories.seed:
            raise ValueError(
                f"demo.evaluation.seed is {self.demo.evaluation.seed}, as trajectories.seed; expected another one"
            )
        if self.recipe.teacher.train is None:
            raise ValueError("teacher.train is missing; expected the settings of the teacher's training")
        if self.recipe.gan is None:
            raise ValueError("gan is missing; expected the settings of the fine-tune")


def load_config(quick: bool = False, changes: dict[str, Any] | None = None, family: str = "dit") -> DemoConfig:
    """The settings of configs/digits.yaml (digits_sit.yaml for the family "sit"), under its ``quick`` section if asked,
    under ``changes``."""
    if family not in RECIPES:
        raise ValueError(
            f"family: got {family!r}; expected one of {', '.join(RECIPES)}, which the demo has a recipe for"
        )
    values = read_values(RECIPES[family])
    shorter = values["demo"].pop("quick")
    values = merge(merge(values, shorter if quick else {}), changes or {})
    comparison = build(ComparisonConfig, values.pop("demo"), "demo")
    return DemoConfig(replace(build(Recipe, values), preview=PreviewConfig(every=0)), comparison)


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
class Sampler:
    """One row of the report: a student of one seed."""

    name: str
    history_layers: int
    seed: int
    student: ARDStudent
    log: list[dict]


def run_demo(out: Path, quick: bool = False, config: DemoConfig | None = None, family: str = "dit") -> Path:
    """Runs every stage and returns the path of report.md.

    out: folder for report.json, report.md, grid.png, losses.png, the runs and the trajectory store; made if absent.
        A trajectory store left there by the same teacher and settings is reused, training starts anew.
    config: instead of ``load_config(quick, family=family)``.
    """
    config, out = config or load_config(quick, family=family), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    watch, data = Stopwatch(), digits.load()
    with watch.stage("classifier", 1) as advance:
        classifier, accuracy = digit_classifier.train_classifier(data, config.demo.classifier)
        advance()
    teacher, teacher_sha256, teacher_log = make_teacher(data, config.recipe, out, watch)
    store = make_trajectories(teacher, teacher_sha256, config.recipe, out, watch)
    samplers = []
    for seed in config.demo.seeds:
        samplers += make_students(teacher, teacher_sha256, store, data, seed, config, out, watch)
    judge = Judge(teacher, classifier, data, config, watch)
    teacher_scores = judge.scores(judge.teacher_images)
    rows = [judge.row(sampler) for sampler in samplers]
    costs = measure_costs(teacher, samplers, config, watch)
    result = {
        "quick": quick,
        "settings": {**plain(config.recipe), "demo": plain(config.demo)},
        "environment": report.environment(),
        "seconds_per_stage": watch.seconds,
        "classifier_held_out_accuracy": accuracy,
        "teacher": {"parameters": sum(p.numel() for p in teacher.parameters()), **teacher_scores},
        "students": rows,
        "summary": summarize(rows),
        "costs_per_image": costs,
    }
    write_json(out / "report.json", result)
    report.write_losses(out / "losses.png", teacher_log, {(s.name, s.seed): s.log for s in samplers})
    report.write_grid(out / "grid.png", judge.teacher_images, judge.student_images, judge.labels)
    return report.write_markdown(out / "report.md", result)


def make_teacher(data: digits.Digits, recipe: Recipe, out: Path, watch: Stopwatch) -> tuple[Teacher, str, list[dict]]:
    """The averaged teacher in eval mode, the sha256 of its weights' file, and its log."""
    assert recipe.teacher.train is not None  # of a DemoConfig
    with watch.training("teacher", recipe.teacher.train.steps) as on_step:
        teacher, fitted = stages.train_teacher(
            recipe, data.train_images, data.train_labels, out / "teacher", data="digits", resume=False, on_step=on_step
        )
    return averaged(teacher, fitted), open_source(out / "teacher").sha256, fitted.log


def averaged(model: Model, fitted: Fitted) -> Model:
    return fitted.ema.copy_to(model).eval().requires_grad_(False)


def make_trajectories(
    teacher: Teacher, teacher_sha256: str, recipe: Recipe, out: Path, watch: Stopwatch
) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings, and checks its hashes."""
    spec = stages.store_spec(recipe, teacher_sha256, stages.source_of(recipe))
    folder = out / "trajectories" / spec.fingerprint()
    with watch.stage("trajectories", recipe.trajectories.count) as advance:
        store = stages.make_trajectories(recipe, teacher, teacher_sha256, folder, on_progress=advance)
        store.verify()
    return store


def make_students(
    teacher: Teacher,
    teacher_sha256: str,
    store: TrajectoryStore,
    data: digits.Digits,
    seed: int,
    config: DemoConfig,
    out: Path,
    watch: Stopwatch,
) -> list[Sampler]:
    """The averaged students of one seed, in eval mode: one per history_layers, and the last one fine-tuned."""
    recipe, samplers = config.recipe, []
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
    name, real = f"{name} + GAN", LatentsInMemory("digits", data.train_images, data.train_labels)
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


class Judge:
    """Scores samplers on one set of held-out noise; the teacher's images from it are the reference."""

    def __init__(
        self, teacher: Teacher, classifier: DigitClassifier, data: digits.Digits, config: DemoConfig, watch: Stopwatch
    ):
        settings = config.demo.evaluation
        self.classifier, self.watch, self.batch_size = classifier, watch, settings.batch_size
        self.noise = noise_at(settings.seed, range(settings.count), digits.IMAGE_SHAPE)
        self.labels = torch.arange(settings.count) % digits.NUM_CLASSES
        self.real = self.statistics(torch.cat([data.train_images, data.held_out_images]))
        sample = stages.sampler(teacher, config.recipe.trajectories, (0,), torch.device("cpu"))
        self.teacher_images = self.sample("score teacher", lambda noise, labels: sample(noise, labels).x0[:, -1])
        self.teacher = self.statistics(self.teacher_images)
        self.student_images: dict[tuple[str, int], torch.Tensor] = {}

    def statistics(self, images: torch.Tensor) -> FeatureStatistics:
        return feature_statistics(self.classifier.features(images))

    def sample(self, name: str, sampler: Callable) -> torch.Tensor:
        """Images of all held-out noise."""
        images = []
        with self.watch.stage(name, len(self.labels)) as advance:
            batches = zip(self.noise.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            for noise, labels in batches:
                images.append(sampler(noise, labels))
                advance(len(labels))
        return torch.cat(images)

    def scores(self, images: torch.Tensor) -> dict[str, float]:
        return {
            "frechet_to_real": frechet_distance(self.statistics(images), self.real),
            "class_consistency": class_consistency(self.classifier(images), self.labels),
        }

    def row(self, sampler: Sampler) -> dict[str, Any]:
        images = self.sample(
            f"score {sampler.name} seed {sampler.seed}",
            lambda noise, labels: sampler.student.sample(noise, labels)[:, -1],
        )
        self.student_images[sampler.name, sampler.seed] = images
        return {
            "sampler": sampler.name,
            "history_layers": sampler.history_layers,
            "seed": sampler.seed,
            "frechet_to_teacher": frechet_distance(self.statistics(images), self.teacher),
            "endpoint_mse": endpoint_mse(images, self.teacher_images),
            **self.scores(images),
        }


def summarize(rows: list[dict]) -> dict:
    """Per sampler: mean, min, max of each score over seeds; and, seed by seed, how many times smaller it is.

    A student with history is compared with the first one, a fine-tuned one with the one it started from.
    """
    metrics = ("frechet_to_teacher", "endpoint_mse", "frechet_to_real", "class_consistency")
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["sampler"], []).append(row)

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}

    first, ratios = next(iter(by_name)), {}
    for name, own in by_name.items():
        other = name.removesuffix(" + GAN") if name.endswith(" + GAN") else first
        if name != other:
            pairs = list(zip(by_name[other], own, strict=True))
            better = {metric: spread([base[metric] / row[metric] for base, row in pairs]) for metric in metrics[:3]}
            ratios[name] = {"over": other, **better}
    scores = {
        name: {metric: spread([row[metric] for row in own]) for metric in metrics} for name, own in by_name.items()
    }
    return {"scores": scores, "times_smaller": ratios}


def measure_costs(teacher: Teacher, samplers: list[Sampler], config: DemoConfig, watch: Stopwatch) -> list[dict]:
    """FLOPs (analytic) and seconds per image of each sampler: median over repeats, the samplers taking turns."""
    settings, trajectories = config.demo.evaluation, config.recipe.trajectories
    noise = noise_at(settings.seed, range(settings.timing_batch_size), digits.IMAGE_SHAPE)
    labels = torch.arange(settings.timing_batch_size) % digits.NUM_CLASSES
    forwards = trajectories.sampling_steps * (1 if trajectories.cfg_scale == 1.0 else 2)
    sample = stages.sampler(teacher, trajectories, (0,), torch.device("cpu"))
    # name, history layers, (noise, labels) -> samples, FLOPs of an image
    runs: list[tuple[str, int | None, Callable[[torch.Tensor, torch.Tensor], object], int]]
    runs = [("teacher", None, sample, forwards * flops.teacher_forward(teacher.config))]
    for sampler in samplers[: len(config.demo.history_layers)]:  # a fine-tune changes no cost
        n = sampler.history_layers
        cost = flops.student_sampling(teacher.config, config.recipe.steps, n)
        runs.append((f"student N={n}", n, sampler.student.sample, cost))
    times: dict[str, list[float]] = {name: [] for name, *_ in runs}
    with watch.stage("timing", settings.timing_repeats) as advance:
        for _ in range(settings.timing_repeats):
            for name, _, run, _ in runs:
                start = time.perf_counter()
                run(noise, labels)
                times[name].append(time.perf_counter() - start)
            advance()
    return [
        {
            "sampler": name,
            "history_layers": n,
            "flops": cost,
            "seconds": statistics.median(times[name]) / settings.timing_batch_size,
        }
        for name, n, _, cost in runs
    ]
