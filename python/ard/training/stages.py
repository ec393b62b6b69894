"""The stages of the method, from weights to weights: teacher, trajectories, distillation, GAN fine-tune.

Each takes a recipe and opened inputs, and works on all processes. `ard demo` runs them in a row; the commands of
`ard` open their inputs and run one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import fingerprint
from ard.conditions.sources import ConditionSource, condition_source, encoder_of, null_tensors
from ard.config.choices import autocast
from ard.config.recipe import Recipe, plain
from ard.config.sections import TrainConfig, TrajectoriesConfig
from ard.data.latents import RealLatents
from ard.data.trajectories import (
    MakeBatch,
    OnlineTrajectories,
    StoreSpec,
    Trajectories,
    TrajectoryStore,
    generate_store,
)
from ard.diffusion.solvers import solver_of
from ard.diffusion.trajectories import TrajectoryBatch, generate
from ard.models.families import make_teacher
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher, Trunk
from ard.training.gan import GanObjective, feature_timestep
from ard.training.objectives import StudentObjective, TeacherObjective
from ard.training.preview import Preview
from ard.training.run_state import Run
from ard.training.trainer import Fitted, Trainer
from ard.weights.opened import TEXT_ENCODER

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
) -> tuple[Teacher, Fitted]:
    """A teacher trained on images (n, c, h, w) with labels (n,); ``data`` names them in the run's identity."""
    process, config, model = process or Process(), recipe.teacher.train, recipe.model
    if config is None:
        raise ValueError("recipe: teacher.train is missing; expected the settings of the teacher's training")
    if tuple(images.shape[1:]) != model.image_shape:
        raise ValueError(f"model is of {model.image_shape}; expected {tuple(images.shape[1:])}, the images of {data}")
    (condition, *others), num_classes = model.conditions, int(labels.max()) + 1
    if others or not condition.classes:
        raise ValueError(
            f"model.family={model.family!r} takes {', '.join(map(str, model.conditions))}; expected labels"
        )
    if condition.classes != num_classes:
        raise ValueError(f"model.num_classes is {condition.classes}; expected {num_classes}, those of {data}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        teacher = make_teacher(model).to(process.device)
    objective = TeacherObjective(
        images,
        labels,
        convention=model.CONVENTION,
        null=teacher.null_conditions,
        label_dropout=recipe.teacher.label_dropout,
        seed=config.seed,
        device=process.device,
    )
    facts = {"kind": "teacher", "model": asdict(model)}
    identity = {**facts, "train": config.identity(), "label_dropout": recipe.teacher.label_dropout, "data": data}
    run = Run(folder, facts, identity, resume, recipe)
    trainer = Trainer(teacher, objective, config, execution=recipe.execution, process=process, run=run)
    return teacher, trainer.fit(on_step=on_step)


def sampler(
    teacher: Teacher,
    config: TrajectoriesConfig,
    keep: tuple[int, ...],
    device: torch.device,
    null: tuple[Tensor, ...] | None = None,
) -> MakeBatch:
    """(noise, *conditions) on any device -> the teacher's trajectories at ``keep``. null: see `Guidance`."""
    context = autocast(config.precision, device)

    def sample(*inputs: Tensor) -> TrajectoryBatch:
        with context():
            return generate(
                teacher,
                *(tensor.to(device) for tensor in inputs),
                sampling_steps=config.sampling_steps,
                keep=keep,
                solver=config.solver,
                shift=config.shift,
                cfg_scale=config.cfg_scale,
                cfg_channels=config.cfg_channels,
                cfg_interval=config.cfg_interval,
                null=null,
            )

    return sample


def source_of(recipe: Recipe) -> ConditionSource:
    """Where the recipe's conditions come from."""
    return condition_source(recipe.model, recipe.trajectories.prompts)


def student_facts(recipe: Recipe, source: ConditionSource) -> dict[str, Any]:
    """What a student's checkpoints say of it."""
    encoder = encoder_of(source)
    return recipe.student_facts() | ({} if encoder is None else {TEXT_ENCODER: encoder})


def store_spec(recipe: Recipe, teacher_sha256: str, source: ConditionSource) -> StoreSpec:
    """What `make_trajectories` writes."""
    config, model = recipe.trajectories, recipe.model
    return StoreSpec(
        count=config.count,
        shard_size=config.shard_size,
        seed=config.seed,
        image_shape=model.image_shape,
        conditions=source.stored,
        prompts=source.fingerprint,
        negative_prompt=config.negative_prompt,
        sampling_steps=config.sampling_steps,
        keep=config.keep,
        cfg_scale=config.cfg_scale,
        cfg_channels=config.cfg_channels,
        cfg_interval=config.cfg_interval,
        family=model.family,
        model=fingerprint(model),
        solver=solver_of(model.CONVENTION, config.solver),
        shift=config.shift,
        teacher_sha256=teacher_sha256,
        store=config.store,
        dtype=config.dtype,
        precision=config.precision,
    )


def require_model(recipe: Recipe, model: Trunk, what: str) -> None:
    """Raises ValueError unless the model is the recipe's, in family and sizes."""
    if model.config != recipe.model:
        raise ValueError(f"{what} is a {model.config}; expected the recipe's {recipe.model}")


def require_spec(trajectories: Trajectories, spec: StoreSpec) -> None:
    """Raises ValueError naming the first setting in which they differ from what the recipe and teacher give."""
    for field in fields(spec):
        found, expected = getattr(trajectories.spec, field.name), getattr(spec, field.name)
        if found != expected:
            where = trajectories.folder if isinstance(trajectories, TrajectoryStore) else "online generation"
            raise ValueError(f"{where} holds trajectories with {field.name}={found!r}; expected {expected!r}")


def online_trajectories(
    recipe: Recipe, teacher: Teacher, teacher_sha256: str, device: torch.device
) -> OnlineTrajectories:
    """The trajectories that `make_trajectories` would store, made as they are read.

    The teacher is moved to ``device``; with execution.compile its blocks are compiled.
    """
    require_model(recipe, teacher, "teacher")
    config, teacher, source = recipe.trajectories, teacher.to(device), source_of(recipe)
    if recipe.execution.compile:
        for block in teacher.blocks:
            block.compile()
    make_batch = sampler(teacher, config, config.keep, device, null_tensors(source, config.negative_prompt))
    spec = store_spec(recipe, teacher_sha256, source)
    return OnlineTrajectories(spec, make_batch, config.batch_size, device, source)


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
    teacher: Teacher,
    teacher_sha256: str,
    folder: Path,
    *,
    process: Process | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> TrajectoryStore:
    """Generates, or finishes, the store of this teacher and these settings."""
    process, config, source = process or Process(), recipe.trajectories, source_of(recipe)
    require_model(recipe, teacher, "teacher")
    null = null_tensors(source, config.negative_prompt)
    return generate_store(
        folder,
        store_spec(recipe, teacher_sha256, source),
        sampler(teacher.to(process.device), config, config.keep, process.device, null),
        source=source,
        batch_size=config.batch_size,
        process=process,
        on_progress=on_progress,
    )


def distill(
    recipe: Recipe,
    teacher: Teacher,
    teacher_sha256: str,
    trajectories: Trajectories,
    folder: Path,
    *,
    process: Process | None = None,
    resume: bool = True,
    on_step: OnStep | None = None,
) -> tuple[ARDStudent, Fitted]:
    """A student that starts as a copy of the teacher, after regression on the trajectories."""
    require_model(recipe, teacher, "teacher")
    source = source_of(recipe)
    require_spec(trajectories, store_spec(recipe, teacher_sha256, source))
    process, config, student_config = process or Process(), recipe.distill, recipe.student
    student = ARDStudent.from_teacher(
        teacher,
        steps=recipe.steps,
        history_layers=student_config.history_layers,
        window=student_config.window,
        sink=student_config.sink,
        timesteps=recipe.segment_times,
    )
    objective = StudentObjective(trajectories, state=student_config.state, seed=config.seed, device=process.device)
    facts = student_facts(recipe, source)
    identity = {**facts, "train": config.identity(), "trajectories": trajectories.spec.fingerprint()}
    run = Run(folder, facts, identity, resume, recipe)
    return _fit(recipe, student, objective, config, run, trajectories, process, on_step)


def finetune(
    recipe: Recipe,
    student: ARDStudent,
    student_sha256: str,
    teacher: Teacher,
    teacher_sha256: str,
    trajectories: Trajectories,
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
    require_model(recipe, teacher, "teacher")
    require_model(recipe, student, "student")
    source = source_of(recipe)
    require_spec(trajectories, store_spec(recipe, teacher_sha256, source))
    require_groups(recipe, process)
    student, teacher = student.to(process.device), teacher.to(process.device)
    objective = GanObjective(trajectories, student, teacher, real, config, state=recipe.student.state, process=process)
    facts, gan = student_facts(recipe, source), plain(config)
    settings = {name: value for name, value in gan.items() if name not in ("train", "student", "real", "captions")}
    identity = {**facts, "train": config.train.identity(), "gan": settings, "student_sha256": student_sha256}
    settings["feature_timestep"] = feature_timestep(config, recipe.model)
    identity |= {"trajectories": trajectories.spec.fingerprint(), "real": real.fingerprint}
    return _fit(
        recipe,
        student,
        objective,
        config.train,
        Run(folder, facts, identity, resume, recipe),
        trajectories,
        process,
        on_step,
    )


def _fit(
    recipe: Recipe,
    student: ARDStudent,
    objective: StudentObjective,
    config: TrainConfig,
    run: Run,
    trajectories: Trajectories,
    process: Process,
    on_step: OnStep | None,
) -> tuple[ARDStudent, Fitted]:
    student.to(process.device, torch.float32).unfreeze()
    settings = recipe.preview
    preview = Preview(student, trajectories, settings, recipe, run.folder, process) if settings.every else None
    trainer = Trainer(student, objective, config, execution=recipe.execution, process=process, run=run)
    return student, trainer.fit(preview=preview, preview_every=max(1, settings.every), on_step=on_step)
