"""`ard teacher`, `trajectories`, `distill`, `finetune-gan`: the commands that make weights and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ard.cli.base import Config, Device, Overrides, Unfinished, app, refusals
from ard.common.progress import counted, progress_bar

if TYPE_CHECKING:
    from ard.common.process import Process
    from ard.config.recipe import Recipe
    from ard.config.sections import TrainConfig
    from ard.data.trajectories import Trajectories
    from ard.models.trunk import Teacher
    from ard.training.trainer import Fitted

Out = Annotated[Path, typer.Option(help="The run: config.yaml, log.jsonl, checkpoints/, samples/.")]
OptionalOut = Annotated[Path | None, typer.Option(help="The run, as of `ard teacher`; --dry-run needs none.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start anew and remove the run's checkpoints, instead of continuing.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print shapes, parameters, FLOPs, memory and disk; run nothing.")
]
Processes = Annotated[int, typer.Option(min=1, max=65_536, help="GPUs that --dry-run plans for.")]
RandomTeacher = Annotated[bool, typer.Option("--random-teacher", help="Random weights, to try a recipe without any.")]


@app.command()
def teacher(
    config: Config,
    out: Out,
    overrides: Overrides = None,
    fresh: Fresh = False,
    device: Device = None,
) -> None:
    """Train a teacher on the handwritten digits, where no DiT checkpoint is at hand."""
    from ard.data import digits
    from ard.training import stages

    with opened(config, overrides, device) as (recipe, process):
        data, train = digits.load(), required(recipe.teacher.train, "teacher.train")
        with steps_bar("teacher", train, process) as on_step:
            _, fitted = stages.train_teacher(
                recipe,
                data.train_images,
                data.train_labels,
                out,
                data="digits",
                process=process,
                resume=not fresh,
                on_step=on_step,
            )
        say_end(fitted, out, process)


@app.command()
def trajectories(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, laid over the config; or: verify FOLDER.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML file, or a shipped one.")] = None,
    random_teacher: RandomTeacher = False,
    unfinished: Unfinished = False,
    dry_run: DryRun = False,
    device: Device = None,
) -> None:
    """Sample the teacher into `trajectories.folder`, or finish it after a kill. `verify FOLDER` hashes one again."""
    if arguments and arguments[0] == "verify":
        if len(arguments) != 2:
            raise typer.BadParameter("expected: verify FOLDER")
        return verify(Path(arguments[1]))
    if config is None:
        raise typer.BadParameter("expected --config")
    from ard.common.process import PATIENT
    from ard.storage.files import readable_size
    from ard.training import stages

    with opened(config, arguments, device, PATIENT) as (recipe, process):
        if recipe.trajectories.online:
            raise ValueError("trajectories.online is set: `ard distill` makes them as it goes; expected false here")
        if dry_run:
            return show_plan(recipe, "distill", 1, process)
        folder = required(recipe.trajectories.folder, "trajectories.folder")
        dit, sha256 = opened_teacher(recipe, random_teacher, unfinished)
        with progress_bar("trajectories", recipe.trajectories.count, process.is_main) as advance:
            store = stages.make_trajectories(recipe, dit, sha256, Path(folder), process=process, on_progress=advance)
        if process.is_main:
            size = readable_size(store.spec.row_bytes * len(store))
            typer.echo(f"{store.folder}: {len(store)} trajectories in {store.spec.shards} shards, {size}")


def verify(folder: Path) -> None:
    """Hashes every shard again; fails naming those that differ."""
    from ard.data.trajectories import TrajectoryStore

    with refusals():
        store = TrajectoryStore(folder)
        with progress_bar("verify", len(store), is_main=True) as advance:
            store.verify(on_progress=advance)
    typer.echo(f"{folder}: {len(store)} trajectories in {store.spec.shards} shards, all as written")


@app.command()
def distill(
    config: Config,
    out: OptionalOut = None,
    overrides: Overrides = None,
    random_teacher: RandomTeacher = False,
    unfinished: Unfinished = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    processes: Processes = 8,
    device: Device = None,
) -> None:
    """Distil the teacher into a few-step student; run again to continue, with any number of processes."""
    from ard.training import stages

    with opened(config, overrides, device) as (recipe, process):
        if dry_run:
            return show_plan(recipe, "distill", processes, process)
        folder = required(out, "--out")
        dit, sha256 = opened_teacher(recipe, random_teacher, unfinished)
        trajectories = opened_trajectories(recipe, dit, sha256, process)
        with steps_bar("distill", recipe.distill, process) as on_step:
            _, fitted = stages.distill(
                recipe, dit, sha256, trajectories, folder, process=process, resume=not fresh, on_step=on_step
            )
        say_end(fitted, folder, process)


@app.command("finetune-gan")
def finetune_gan(
    config: Config,
    out: OptionalOut = None,
    overrides: Overrides = None,
    random_teacher: RandomTeacher = False,
    unfinished: Unfinished = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    processes: Processes = 8,
    device: Device = None,
) -> None:
    """Fine-tune a distilled student against real latents, by heads on the frozen teacher's features."""
    from ard.conditions.sources import condition_source, encoder_of, require_encoder
    from ard.data.latents import open_real
    from ard.training import stages
    from ard.weights.opened import open_student

    with opened(config, overrides, device) as (recipe, process):
        if recipe.gan is None:
            raise ValueError(f"{config} has no gan section; expected one, as in imagenet256_gan")
        if dry_run:
            return show_plan(recipe, "gan", processes, process)
        folder = required(out, "--out")
        dit, sha256 = opened_teacher(recipe, random_teacher, unfinished)
        distilled = required_path(recipe.gan.student, "gan.student", "a run of `ard distill`, or weights of a student")
        student, source = open_student(distilled, recipe, unfinished=unfinished)
        captions = condition_source(recipe.model, recipe.gan.captions or recipe.trajectories.prompts)
        prompts = stages.source_of(recipe)
        require_encoder(captions, encoder_of(prompts), "trajectories.prompts")
        require_encoder(prompts, source.text_encoder, str(source.path))
        real = open_real(required(recipe.gan.real, "gan.real"), recipe.model, captions)
        trajectories = opened_trajectories(recipe, dit, sha256, process)
        with steps_bar("finetune-gan", recipe.gan.train, process) as on_step:
            _, fitted = stages.finetune(
                recipe,
                student,
                source.sha256,
                dit,
                sha256,
                trajectories,
                real,
                folder,
                process=process,
                resume=not fresh,
                on_step=on_step,
            )
        say_end(fitted, folder, process)


@contextmanager
def opened(
    config: str, overrides: list[str] | None, device: str | None, patience: timedelta | None = None
) -> Iterator[tuple[Recipe, Process]]:
    """The recipe, and this process among those of torchrun."""
    from ard.common.process import started
    from ard.config.recipe import read_recipe

    with refusals():
        recipe = read_recipe(config, overrides or ())
        with started(device, patience) as process:
            yield recipe, process


def opened_teacher(recipe: Recipe, random: bool, unfinished: bool) -> tuple[Teacher, str]:
    """On the CPU: a stage moves it where it needs it."""
    from ard.weights.opened import open_teacher, random_teacher

    if random:
        return random_teacher(recipe.model)
    checkpoint = required_path(
        recipe.teacher.checkpoint, "teacher.checkpoint", "a run, a checkpoint or a file of weights"
    )
    return open_teacher(checkpoint, recipe.model, unfinished=unfinished)


def opened_trajectories(recipe: Recipe, teacher: Teacher, sha256: str, process: Process) -> Trajectories:
    """The store; or, where trajectories.online is set, none."""
    from ard.data.trajectories import TrajectoryStore
    from ard.training.stages import online_trajectories, source_of

    if recipe.trajectories.online:
        return online_trajectories(recipe, teacher, sha256, process.device)
    stored = "what `ard trajectories` makes, or trajectories.online=true"
    folder = required_path(recipe.trajectories.folder, "trajectories.folder", stored)
    return TrajectoryStore(folder, source_of(recipe))


def required(value: Any, name: str) -> Any:
    if value is None:
        raise ValueError(f"{name} is not given; this command needs it")
    return value


def required_path(value: str | None, name: str, expected: str) -> Path:
    path = Path(required(value, name))
    if not path.exists():
        raise FileNotFoundError(f"{name} is {path}, which does not exist; expected {expected}")
    return path


@contextmanager
def steps_bar(name: str, config: TrainConfig, process: Process) -> Iterator[Callable[[int], None]]:
    """Yields on_step(updates done) of a progress bar; a run that continues starts where it was."""
    with progress_bar(name, config.steps, process.is_main) as advance:
        yield counted(advance)


def say_end(fitted: Fitted, folder: Path, process: Process) -> None:
    if not process.is_main:
        return
    last = fitted.log[-1] if fitted.log else {}
    shown = ("loss", "frechet_to_teacher", "samples_per_second")
    scores = ", ".join(f"{name} {last[name]:.4g}" for name in shown if name in last)
    typer.echo(f"{folder}: {fitted.step} steps done; {scores}")


def show_plan(recipe: Recipe, stage: str, processes: int, process: Process) -> None:
    """The table of `--dry-run`."""
    from ard.training.plan import plan

    if not process.is_main:
        return
    what = {"distill": "trajectories and distillation", "gan": "GAN fine-tune"}[stage]
    table = Table(title=f"{what}, trained by {processes} processes; nothing was run")
    table.add_column("")
    table.add_column("", justify="right")
    for section, values in plan(recipe, stage=stage, world_size=processes).items():
        if isinstance(values, dict):
            table.add_section()
            for name, value in values.items():
                table.add_row(f"{section}: {name}", readable(section, value))
    Console().print(table)


def readable(section: str, value: Any) -> str:
    from ard.storage.files import readable_size

    if section in ("memory", "disk"):
        return readable_size(value)
    if isinstance(value, str):
        return value
    if section == "trajectories" and isinstance(value, float):
        return f"{value:.3g}x"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4%}"
