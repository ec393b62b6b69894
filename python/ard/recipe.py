"""Settings of teacher, trajectories, distillation and GAN fine-tune: frozen dataclasses, read from YAML.

A recipe is one YAML file (configs/*.yaml). ``extends: other.yaml`` lays it over another one; ``key.sub=value`` on the
command line is laid over both. Sections that only other commands need (``demo``) are not part of a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from ard.config import build, merge, read_yaml
from ard.files import write_text
from ard.model import DiTConfig
from ard.parallel import STRATEGIES
from ard.store import DTYPES, STATE_KINDS

PRECISIONS = ("fp32", "bf16")
FOREIGN_SECTIONS = ("demo",)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Contexts in which a forward runs: "bf16" is autocast over float32 weights, "fp32" none."""
    _require_one_of("", {"precision": (precision, PRECISIONS)})
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def _require_one_of(section: str, known: dict[str, tuple[Any, Sequence]]) -> None:
    for name, (value, choices) in known.items():
        if value not in choices:
            where = f"{section}.{name}" if section else name
            raise ValueError(f"{where} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _require_positive(section: str, values: dict[str, int]) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{section}.{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """What is computed; the defaults are the paper's student's."""

    steps: int
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # learning rate rises linearly from 0
    cosine_decay: bool = False  # then falls to 0 along a half cosine, or stays
    ema_decay: float = 0.9999
    grad_clip: float = 1.0  # 2-norm over all parameters
    seed: int = 0
    log_every: int = 25  # steps per line of the log; each line holds the means since the line before

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        names = ("steps", "batch_size", "log_every")
        _require_positive("train", {name: getattr(self, name) for name in names})
        if self.warmup_steps < 0:
            raise ValueError(f"train.warmup_steps is {self.warmup_steps}; expected at least 0")
        if not self.grad_clip > 0.0:
            raise ValueError(f"train.grad_clip is {self.grad_clip}; expected above 0, and .inf for no limit")

    def learning_rate_at(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1.0 + math.cos(math.pi * step / self.steps)) if self.cosine_decay else 1.0
        return self.learning_rate * warmup * decay

    def identity(self) -> dict[str, Any]:
        """What must not change for a run to continue; its length may, unless the learning rate depends on it."""
        values = dataclasses.asdict(self)
        for name in ("log_every",) if self.cosine_decay else ("log_every", "steps"):
            del values[name]
        return values


@dataclass(frozen=True)
class ExecutionConfig:
    """How it is computed; the values here change results by rounding at most (bf16's, for `precision`)."""

    strategy: str = "ddp"  # or "fsdp": weights, gradients, optimizer and EMA sharded (FSDP2)
    precision: str = "fp32"  # or "bf16": autocast; weights, optimizer and EMA stay float32
    accumulation: int = 1  # micro-batches per step and process
    activation_checkpointing: bool = False  # blocks keep their inputs only and run again in backward
    compile: bool = False  # torch.compile each block
    save_every: int = 5000  # steps between checkpoints; one is written at the end too
    keep_last: int = 3  # checkpoints
    tensorboard: bool = False  # besides log.jsonl

    def __post_init__(self):
        known = {"strategy": (self.strategy, STRATEGIES), "precision": (self.precision, PRECISIONS)}
        _require_one_of("execution", known)
        names = ("accumulation", "save_every", "keep_last")
        _require_positive("execution", {name: getattr(self, name) for name in names})


def micro_batch_size(batch_size: int, processes: int, accumulation: int) -> int:
    """Samples of one micro-batch of one process. Raises ValueError unless all have equally many."""
    parts = processes * accumulation
    if batch_size % parts:
        raise ValueError(
            f"batch_size is {batch_size}; expected a multiple of {parts}: {processes} processes times {accumulation} "
            "micro-batches"
        )
    return batch_size // parts


@dataclass(frozen=True)
class TeacherConfig:
    """The weights to distil; and, for `ard teacher`, how to make some."""

    checkpoint: str | None = None  # public DiT checkpoint, diffusers folder, or run of `ard teacher`
    label_dropout: float = 0.1  # share of labels replaced by the null label
    train: TrainConfig | None = None


@dataclass(frozen=True)
class TrajectoriesConfig:
    """What `ard trajectories` samples from the teacher."""

    folder: str | None  # the store
    count: int
    shard_size: int
    batch_size: int  # of one process
    seed: int  # of the noise
    sampling_steps: int = 25  # teacher steps
    keep: tuple[int, ...] = (15, 10, 5, 0)  # respaced indices of the student's targets
    cfg_scale: float = 1.5
    cfg_channels: int = 3  # guided latent channels
    store: tuple[str, ...] = ("x0",)  # state kinds
    dtype: str = "float16"
    precision: str = "fp32"  # of the teacher's forward

    def __post_init__(self):
        _require_positive("trajectories", {"batch_size": self.batch_size})
        _require_one_of(
            "trajectories", {"dtype": (self.dtype, list(DTYPES)), "precision": (self.precision, PRECISIONS)}
        )


@dataclass(frozen=True)
class StudentConfig:
    """The student; its steps are the trajectories' ``keep``."""

    history_layers: int = 6
    window: int | None = None
    sink: int = 0
    state: str = "x0"  # or "ode"

    def __post_init__(self):
        _require_one_of("student", {"state": (self.state, STATE_KINDS)})


@dataclass(frozen=True)
class PreviewConfig:
    """Grids of samples and their Frechet distance to the teacher, during training, by the averaged weights."""

    every: int  # steps; 0 for never
    count: int = 1024  # samples
    batch_size: int = 64  # of one process
    grid: int = 64  # samples shown
    features: str = "pooled"  # see `ard.features.load_features`
    vae: str | None = None  # decodes latents for grid and features

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"preview.every is {self.every}; expected at least 0")
        names = ("count", "batch_size", "grid")
        _require_positive("preview", {name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class GanConfig:
    """Fine-tune of a distilled student against heads on the frozen teacher's features ("R+G")."""

    train: TrainConfig
    student: str | None = None  # run or checkpoint of `ard distill`
    real: str | None = None  # store of `ard latents`, or "digits"
    discriminator_learning_rate: float = 1e-3
    discriminator_betas: tuple[float, float] = (0.9, 0.999)
    start: int = 3000  # steps before which the generator's weight is zero
    factor: float = 10.0  # on the adaptive weight
    largest_weight: float = 1e4  # of the adaptive weight, before the factor
    feature_timestep: int = 0  # at which the teacher reads clean latents
    projection: int = 64  # dimensions of the conditional projection
    kernel_size: int = 9  # of the residual convolution over tokens
    virtual_batch: int = 8  # consecutive samples of one process that share a batch norm's statistics

    def __post_init__(self):
        names = ("projection", "kernel_size", "virtual_batch")
        _require_positive("gan", {name: getattr(self, name) for name in names})
        if self.kernel_size % 2 == 0:
            raise ValueError(f"gan.kernel_size is {self.kernel_size}; expected an odd number")


@dataclass(frozen=True)
class Recipe:
    model: DiTConfig
    teacher: TeacherConfig
    trajectories: TrajectoriesConfig
    student: StudentConfig
    distill: TrainConfig
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    preview: PreviewConfig = field(default_factory=lambda: PreviewConfig(every=0))
    gan: GanConfig | None = None

    @property
    def steps(self) -> int:
        """S, the student's steps."""
        return len(self.trajectories.keep)

    def student_facts(self) -> dict[str, Any]:
        """What a reader of a student's checkpoint needs to build it."""
        student = {**dataclasses.asdict(self.student), "steps": self.steps}
        return {"kind": "student", "model": dataclasses.asdict(self.model), "student": student}


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or in the shipped one of that name ("imagenet256"), with ``key.sub=value`` over it.

    Raises ValueError on an unknown key (naming the nearest valid one), a missing key, or a value of the wrong type.
    """
    values = {key: value for key, value in read_values(source).items() if key not in FOREIGN_SECTIONS}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override: got {override!r}; expected key.sub=value")
        try:
            nested: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"override: got {override!r}; expected key.sub=value, the value YAML") from error
        for name in reversed(key.split(".")):
            nested = {name: nested}
        values = merge(values, nested)
    return build(Recipe, values)


def read_values(source: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with those it extends under it; relative names are beside it.

    above: the files that extend this one.
    """
    path = Path(source)
    if not path.suffix:
        path = Path(str(files("ard") / "configs" / f"{source}.yaml"))
        if not path.exists():
            known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
            raise ValueError(f"config: no shipped recipe {str(source)!r}; expected a YAML file or one of {known}")
    if path.resolve() in above:
        raise ValueError(f"config: {path} extends itself, by way of {', '.join(other.name for other in above)}")
    values = read_yaml(path)
    base = values.pop("extends", None)
    return values if base is None else merge(read_values(path.parent / base, (*above, path.resolve())), values)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal one."""
    write_text(path, yaml.safe_dump(plain(recipe), sort_keys=False))


def plain(config: Any) -> dict[str, Any]:
    """A config as mappings, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, tuple) else value

    return convert(dataclasses.asdict(config))
