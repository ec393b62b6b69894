"""The stages of the method, from weights to weights: teacher, trajectories, distillation, GAN fine-tune.

Each takes a recipe and opened inputs, and works on all processes. `ard demo` runs them in a row; the commands of
`ard` open their inputs and run one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.gan import GanObjective, RealLatents
from ard.model import DiT
from ard.objectives import StudentObjective, TeacherObjective
from ard.parallel import Process
from ard.preview import Preview
from ard.recipe import Recipe, TrainConfig, TrajectoriesConfig, autocast, plain
from ard.store import StoreSpec, TrajectoryStore, generate_store
from ard.student import ARDStudent
from ard.train import Fitted, Run, Trainer
from ard.trajectories import TrajectoryBatch, generate

OnStep = Callable[[int], Any]


def train_teacher(
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    folder: Path,
    *,
    data: str,
    process: Process | None = None,
    resume: bool = True,
    on_step: OnStep | None = None,
) -> tuple[DiT, Fitted]:
    """A teacher trained on images (n, c, h, w) with labels (n,); ``data`` names them in the run's identity."""
    process, config = process or Process(), recipe.teacher.train
    if config is None:
        raise ValueError("recipe: teacher.train is missing; expected the settings of the teacher's training")
    shape, num_classes = (recipe.model.in_channels, *recipe.model.input_hw), int(labels.max()) + 1
    if tuple(images.shape[1:]) != shape:
        raise ValueError(f"model is of {shape}; expected {tuple(images.shape[1:])}, the images of {data}")
    if recipe.model.num_classes != num_classes:
        raise ValueError(f"model.num_classes is {recipe.model.num_classes}; expected {num_classes}, those of {data}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        teacher = DiT(recipe.model).to(process.device)
    objective = TeacherObjective(
        images,
        labels,
        null_label=recipe.model.num_classes,
        label_dropout=recipe.teacher.label_dropout,
        seed=config.seed,
        device=process.device,
    )
    facts = {"kind": "teacher", "model": asdict(recipe.model)}
    identity = {**facts, "train": config.identity(), "label_dropout": recipe.teacher.label_dropout, "data": data}
    run = Run(folder, facts, identity, resume, recipe)
    trainer = Trainer(teacher, objective, config, execution=recipe.execution, process=process, run=run)
    return teacher, trainer.fit(on_step=on_step)


def sampler(
    teacher: DiT, config: TrajectoriesConfig, keep: tuple[int, ...], device: torch.device
) -> Callable[[Tensor, Tensor], TrajectoryBatch]:
    """(noise, labels) on any device -> the teacher's trajectories at ``keep``."""
    context = autocast(config.precision, device)

    def sample(noise: Tensor, labels: Tensor) -> TrajectoryBatch:
        with context():
            return generate(
                teacher,
                noise.to(device),
                labels.to(device),
                sampling_steps=config.sampling_steps,
                keep=keep,
                cfg_scale=config.cfg_scale,
                cfg_channels=config.cfg_channels,
            )

    return sample


def store_spec(recipe: Recipe, teacher_sha256: str) -> StoreSpec:
    """What `make_trajectories` writes."""
    config = recipe.trajectories
    return StoreSpec(
        count=config.count,
        shard_size=config.shard_size,
        seed=config.seed,
        image_shape=(recipe.model.in_channels, *recipe.model.input_hw),
        num_classes=recipe.model.num_classes,
        sampling_steps=config.sampling_steps,
        keep=config.keep,
        cfg_scale=config.cfg_scale,
        cfg_channels=config.cfg_channels,
        teacher_sha256=teacher_sha256,
        store=config.store,
        dtype=config.dtype,
        precision=config.precision,
    )


def require_store(store: TrajectoryStore, spec: StoreSpec) -> None:
    """Raises ValueError naming the first setting in which a store differs from what the recipe and teacher give."""
    for name, value in asdict(spec).items():
        found = getattr(store.spec, name)
        if found != value:
            raise ValueError(f"{store.folder} holds trajectories with {name}={found!r}; expected {value!r}")


def require_groups(recipe: Recipe, process: Process) -> None:
    """The GAN's batch norms and adaptive weight see whole micro-batches: raises ValueError if those were too small."""
    config, accumulation = recipe.gan, recipe.execution.accumulation
    if config is None:
        raise ValueError("recipe: gan is missing; expected the settings of the fine-tune")
    if accumulation != 1:
        raise ValueError(
            f"execution.accumulation is {accumulation}; expected 1 for the GAN fine-tune, whose adaptive weight is "
            "that of the whole batch (execution.activation_checkpointing saves memory too)"
        )
    local = config.train.batch_size // process.world_size
    if local % config.virtual_batch:
        raise ValueError(
            f"gan.train.batch_size is {config.train.batch_size}, {local} for each of {process.world_size} processes; "
            f"expected a multiple of gan.virtual_batch={config.virtual_batch} for each"
        )


def make_trajectories(
    recipe: Recipe,
    teacher: DiT,
    teacher_sha256: str,
    folder: Path,
    *,
    process: Process | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings."""
    process = process or Process()
    return generate_store(
        folder,
        store_spec(recipe, teacher_sha256),
        sampler(teacher.to(process.device), recipe.trajectories, recipe.trajectories.keep, process.device),
        batch_size=recipe.trajectories.batch_size,
        process=process,
        on_progress=on_progress,
    )


def distill(
    recipe: Recipe,
    teacher: DiT,
    teacher_sha256: str,
    store: TrajectoryStore,
    folder: Path,
    *,
    process: Process | None = None,
    resume: bool = True,
    on_step: OnStep | None = None,
) -> tuple[ARDStudent, Fitted]:
    """A student that starts as a copy of the teacher, after regression on the trajectories."""
    require_store(store, store_spec(recipe, teacher_sha256))
    process, config, student_config = process or Process(), recipe.distill, recipe.student
    student = ARDStudent.from_teacher(
        teacher,
        steps=recipe.steps,
        history_layers=student_config.history_layers,
        window=student_config.window,
        sink=student_config.sink,
    )
    objective = StudentObjective(store, state=student_config.state, seed=config.seed, device=process.device)
    facts = recipe.student_facts()
    identity = {**facts, "train": config.identity(), "trajectories": store.spec.fingerprint()}
    return _fit(
        recipe, student, objective, config, Run(folder, facts, identity, resume, recipe), store, process, on_step
    )


def finetune(
    recipe: Recipe,
    student: ARDStudent,
    student_sha256: str,
    teacher: DiT,
    teacher_sha256: str,
    store: TrajectoryStore,
    real: RealLatents,
    folder: Path,
    *,
    process: Process | None = None,
    resume: bool = True,
    on_step: OnStep | None = None,
) -> tuple[ARDStudent, Fitted]:
    """``student``, trained on in place by regression and the GAN losses. student_sha256: of its weights so far."""
    process, config = process or Process(), recipe.gan
    if config is None:
        raise ValueError("recipe: gan is missing; expected the settings of the GAN fine-tune")
    require_store(store, store_spec(recipe, teacher_sha256))
    require_groups(recipe, process)
    student, teacher = student.to(process.device), teacher.to(process.device)
    objective = GanObjective(store, student, teacher, real, config, state=recipe.student.state, process=process)
    facts, gan = recipe.student_facts(), plain(config)
    settings = {name: value for name, value in gan.items() if name not in ("train", "student", "real")}
    identity = {**facts, "train": config.train.identity(), "gan": settings, "student_sha256": student_sha256}
    identity |= {"trajectories": store.spec.fingerprint(), "real": real.fingerprint}
    return _fit(
        recipe, student, objective, config.train, Run(folder, facts, identity, resume, recipe), store, process, on_step
    )


def _fit(
    recipe: Recipe,
    student: ARDStudent,
    objective: StudentObjective,
    config: TrainConfig,
    run: Run,
    store: TrajectoryStore,
    process: Process,
    on_step: OnStep | None,
) -> tuple[ARDStudent, Fitted]:
    student.to(process.device, torch.float32).requires_grad_(True)
    student.pos_embed.requires_grad_(False)
    settings = recipe.preview
    preview = Preview(student, store, settings, recipe, run.folder, process) if settings.every else None
    trainer = Trainer(student, objective, config, execution=recipe.execution, process=process, run=run)
    return student, trainer.fit(preview=preview, preview_every=max(1, settings.every), on_step=on_step)
