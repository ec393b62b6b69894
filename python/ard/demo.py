"""`ard demo`: the whole method on real digits, from a teacher to scored students, in one folder.

    classifier -> teacher -> trajectories -> students with and without history -> samples from held-out noise -> report

The students of one seed start from the same weights (the teacher's) and see the same batches in the same order for the
same number of steps; they differ in the number of layers that read the history, and in nothing else. Zero layers is
plain step distillation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ard import digits, report
from ard.config import build, merge, read_yaml
from ard.digits import ClassifierConfig, DigitClassifier
from ard.files import write_json
from ard.metrics import FeatureStatistics, class_consistency, endpoint_mse, feature_statistics, frechet_distance
from ard.model import DiT, DiTConfig
from ard.store import StoreSpec, TrajectoryStore, generate_store, noise_at
from ard.student import ARDStudent
from ard.train import Fitted, TrainConfig, fit, save_checkpoint, student_step_loss, teacher_step_loss
from ard.trajectories import generate
from ard_kernels import flops


@dataclass(frozen=True)
class TeacherConfig:
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    label_dropout: float  # share of labels replaced by the null label
    train: TrainConfig

    def model(self) -> DiTConfig:
        channels, side, _ = digits.IMAGE_SHAPE
        return DiTConfig(
            input_size=side,
            patch_size=self.patch_size,
            in_channels=channels,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            num_classes=digits.NUM_CLASSES,
            learn_sigma=False,
        )


@dataclass(frozen=True)
class TrajectoriesConfig:
    count: int
    shard_size: int
    batch_size: int
    seed: int  # of the noise
    sampling_steps: int  # teacher steps
    keep: tuple[int, ...]  # respaced indices of the student's targets
    cfg_scale: float


@dataclass(frozen=True)
class StudentsConfig:
    history_layers: tuple[int, ...]  # one student each; the first, 0, is the baseline
    seeds: tuple[int, ...]  # of the data order; replaces train.seed
    state: str  # "x0" or "ode"
    train: TrainConfig

    def __post_init__(self):
        if len(self.history_layers) < 2 or self.history_layers[0] != 0:
            raise ValueError(f"students.history_layers is {list(self.history_layers)}; expected 0 first, then others")
        if not self.seeds:
            raise ValueError("students.seeds is empty; expected at least one seed")


@dataclass(frozen=True)
class EvaluationConfig:
    count: int  # images per sampler
    batch_size: int
    seed: int  # of the held-out noise
    timing_batch_size: int
    timing_repeats: int


@dataclass(frozen=True)
class DemoConfig:
    classifier: ClassifierConfig
    teacher: TeacherConfig
    trajectories: TrajectoriesConfig
    students: StudentsConfig
    evaluation: EvaluationConfig

    def __post_init__(self):
        if self.evaluation.seed == self.trajectories.seed:
            raise ValueError(f"evaluation.seed is {self.evaluation.seed}, as trajectories.seed; expected another one")


def load_config(quick: bool = False) -> DemoConfig:
    """The settings of configs/digits.yaml, with its ``quick`` section laid over them if asked."""
    values = read_yaml(files("ard") / "configs" / "digits.yaml")
    changes = values.pop("quick")
    return build(DemoConfig, merge(values, changes) if quick else values)


@dataclass
class Stopwatch:
    """Seconds per stage, and a progress bar while a stage runs."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int):
        """Yields advance(n=1)."""
        task, start = self.progress.add_task(name, total=total), time.perf_counter()
        yield lambda n=1: self.progress.advance(task, n)
        self.progress.update(task, completed=total)
        self.seconds[name] = time.perf_counter() - start


def run_demo(out: Path, quick: bool = False, config: DemoConfig | None = None) -> Path:
    """Runs every stage and returns the path of report.md.

    out: folder for report.json, report.md, grid.png, losses.png, the checkpoints, the trajectory store and the logs;
        made if absent. A trajectory store left there by the same teacher and settings is reused.
    config: instead of ``load_config(quick)``.
    """
    config, out = config or load_config(quick), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        watch = Stopwatch(progress)
        data = digits.load()
        with watch.stage("classifier", 1):
            classifier, accuracy = digits.train_classifier(data, config.classifier)
        teacher, teacher_sha256, teacher_log = train_teacher(data, config, out, watch)
        store = make_trajectories(teacher, teacher_sha256, config, out, watch)
        students, student_logs = {}, {}
        for seed in config.students.seeds:
            for layers in config.students.history_layers:
                students[layers, seed], student_logs[layers, seed] = distill(
                    teacher, store, layers, seed, config, out, watch
                )
        judge = Judge(teacher, classifier, data, config, watch)
        teacher_scores, rows = judge.teacher_scores(), []
        for (layers, seed), student in students.items():
            rows.append({"history_layers": layers, "seed": seed, **judge.student_scores(student, layers, seed)})
        costs = measure_costs(teacher, students, config, watch)
    result = {
        "quick": quick,
        "settings": asdict(config),
        "environment": report.environment(),
        "seconds_per_stage": watch.seconds,
        "classifier_held_out_accuracy": accuracy,
        "teacher": {"parameters": sum(p.numel() for p in teacher.parameters()), **teacher_scores},
        "students": rows,
        "summary": summarize(rows, config.students.history_layers),
        "costs_per_image": costs,
    }
    write_json(out / "report.json", result)
    report.write_losses(out / "losses.png", teacher_log, student_logs)
    report.write_grid(out / "grid.png", judge.teacher_images, judge.student_images, judge.labels)
    return report.write_markdown(out / "report.md", result)


def train_teacher(data: digits.Digits, config: DemoConfig, out: Path, watch: Stopwatch) -> tuple[DiT, str, list[dict]]:
    """The averaged teacher in eval mode, the sha256 of its weights' file, and its log."""
    settings = config.teacher
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        teacher = DiT(settings.model())
    step_loss = teacher_step_loss(teacher, data.train_images, data.train_labels, settings.train, settings.label_dropout)
    with watch.stage("teacher", settings.train.steps) as advance:
        fitted = fit(teacher, step_loss, settings.train, log_path=out / "teacher.jsonl", on_step=advance)
    sha256 = save_checkpoint(out / "teacher", teacher, fitted, settings.train, {"model": asdict(teacher.config)})
    return averaged(teacher, fitted), sha256["ema.safetensors"], fitted.log


def averaged(model: torch.nn.Module, fitted: Fitted) -> torch.nn.Module:
    return fitted.ema.copy_to(model).eval().requires_grad_(False)


def make_trajectories(
    teacher: DiT, teacher_sha256: str, config: DemoConfig, out: Path, watch: Stopwatch
) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings, and checks its hashes."""
    settings = config.trajectories
    spec = StoreSpec(
        count=settings.count,
        shard_size=settings.shard_size,
        seed=settings.seed,
        image_shape=digits.IMAGE_SHAPE,
        num_classes=digits.NUM_CLASSES,
        sampling_steps=settings.sampling_steps,
        keep=settings.keep,
        cfg_scale=settings.cfg_scale,
        cfg_channels=digits.IMAGE_SHAPE[0],
        teacher_sha256=teacher_sha256,
    )
    with watch.stage("trajectories", settings.count) as advance:
        store = generate_store(
            out / "trajectories" / spec.fingerprint(),
            spec,
            sampler(teacher, config, settings.keep),
            batch_size=settings.batch_size,
            on_progress=advance,
        )
        store.verify()
    return store


def sampler(teacher: DiT, config: DemoConfig, keep: tuple[int, ...]) -> Callable:
    """(noise, labels) -> the teacher's trajectories at ``keep``."""
    settings = config.trajectories
    return lambda noise, labels: generate(
        teacher,
        noise,
        labels,
        sampling_steps=settings.sampling_steps,
        keep=keep,
        cfg_scale=settings.cfg_scale,
        cfg_channels=digits.IMAGE_SHAPE[0],
    )


def distill(
    teacher: DiT, store: TrajectoryStore, layers: int, seed: int, config: DemoConfig, out: Path, watch: Stopwatch
) -> tuple[ARDStudent, list[dict]]:
    """The averaged student in eval mode, and its log."""
    settings = replace(config.students.train, seed=seed)
    student = ARDStudent.from_teacher(teacher, steps=len(store.spec.keep), history_layers=layers).requires_grad_(True)
    student.pos_embed.requires_grad_(False)
    name = f"student-n{layers}-seed{seed}"
    step_loss = student_step_loss(student, store, settings, config.students.state)
    with watch.stage(f"student N={layers} seed {seed}", settings.steps) as advance:
        fitted = fit(student, step_loss, settings, log_path=out / f"{name}.jsonl", on_step=advance)
    facts = {"model": asdict(student.config), "history_layers": layers, "state": config.students.state}
    save_checkpoint(out / name, student, fitted, settings, facts)
    return averaged(student, fitted), fitted.log


class Judge:
    """Scores samplers on one set of held-out noise; the teacher's images from it are the reference."""

    def __init__(
        self, teacher: DiT, classifier: DigitClassifier, data: digits.Digits, config: DemoConfig, watch: Stopwatch
    ):
        settings = config.evaluation
        self.classifier, self.watch, self.batch_size = classifier, watch, settings.batch_size
        self.noise = noise_at(settings.seed, range(settings.count), digits.IMAGE_SHAPE)
        self.labels = torch.arange(settings.count) % digits.NUM_CLASSES
        self.real = self.statistics(torch.cat([data.train_images, data.held_out_images]))
        sample = sampler(teacher, config, (0,))
        self.teacher_images = self.sample("score teacher", lambda noise, labels: sample(noise, labels).x0[:, -1])
        self.teacher = self.statistics(self.teacher_images)
        self.student_images: dict[tuple[int, int], torch.Tensor] = {}

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

    def teacher_scores(self) -> dict[str, float]:
        return self.scores(self.teacher_images)

    def student_scores(self, student: ARDStudent, layers: int, seed: int) -> dict[str, float]:
        images = self.sample(
            f"score N={layers} seed {seed}", lambda noise, labels: student.sample(noise, labels)[:, -1]
        )
        self.student_images[layers, seed] = images
        return {
            "frechet_to_teacher": frechet_distance(self.statistics(images), self.teacher),
            "endpoint_mse": endpoint_mse(images, self.teacher_images),
            **self.scores(images),
        }


def summarize(rows: list[dict], history_layers: tuple[int, ...]) -> dict:
    """Per N: mean, min, max of each score over seeds. Per N > 0: the baseline's score over its own, seed by seed."""
    metrics = ("frechet_to_teacher", "endpoint_mse", "frechet_to_real", "class_consistency")
    by_layers = {n: [row for row in rows if row["history_layers"] == n] for n in history_layers}

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}

    return {
        "scores": {
            str(n): {metric: spread([row[metric] for row in by_layers[n]]) for metric in metrics}
            for n in history_layers
        },
        "baseline_over_student": {
            str(n): {
                metric: spread(
                    [base[metric] / row[metric] for base, row in zip(by_layers[0], by_layers[n], strict=True)]
                )
                for metric in metrics[:2]
            }
            for n in history_layers[1:]
        },
    }


def measure_costs(teacher: DiT, students: dict, config: DemoConfig, watch: Stopwatch) -> list[dict]:
    """FLOPs (analytic) and seconds per image of each sampler: median over repeats, the samplers taking turns."""
    settings, steps, seed = config.evaluation, len(config.trajectories.keep), config.students.seeds[0]
    noise = noise_at(settings.seed, range(settings.timing_batch_size), digits.IMAGE_SHAPE)
    labels = torch.arange(settings.timing_batch_size) % digits.NUM_CLASSES
    teacher_forwards = config.trajectories.sampling_steps * (1 if config.trajectories.cfg_scale == 1.0 else 2)
    runs = [("teacher", None, sampler(teacher, config, (0,)), teacher_forwards * flops.teacher_forward(teacher.config))]
    for n in config.students.history_layers:
        cost = flops.student_sampling(teacher.config, steps, n)
        runs.append((f"student N={n}", n, students[n, seed].sample, cost))
    times = {name: [] for name, *_ in runs}
    with watch.stage("timing", settings.timing_repeats) as advance:
        for _ in range(settings.timing_repeats):
            for name, _, sample, _ in runs:
                start = time.perf_counter()
                sample(noise, labels)
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
