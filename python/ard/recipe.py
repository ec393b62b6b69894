"""Settings of teacher, trajectories, distillation and GAN fine-tune: frozen dataclasses, read from YAML.

A recipe is one YAML file (configs/*.yaml). ``extends: other.yaml`` lays it over another one beside it, ``extends:
digits`` over a shipped one; ``key.sub=value`` on the command line is laid over both. Its value is YAML, or, for a
setting that is text, the text as it stands; ``~`` in a path is the home folder. Sections that only other commands need
(``demo``) are not part of a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch

from ard.config import COUNT, SEED, Ranged, build, expand_paths, merge, parse_override
from ard.diffusion import TRAIN_STEPS
from ard.files import write_text
from ard.model_config import DiTConfig
from ard.parallel import STRATEGIES
from ard.store import DTYPES, STATE_KINDS
from ard.trajectories import check_keep
from ard_kernels.common.arguments import described

PRECISIONS = ("fp32", "bf16")
FOREIGN_SECTIONS = ("demo",)
LARGEST_SHARDS = 100_000  # their names have five digits


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Contexts in which a forward runs: "bf16" is autocast over float32 weights, "fp32" none."""
    _require_one_of("", {"precision": (precision, PRECISIONS)})
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def _require_one_of(section: str, known: Mapping[str, tuple[Any, Sequence[Any]]]) -> None:
    for name, (value, choices) in known.items():
        if value not in choices:
            where = f"{section}.{name}" if section else name
            raise ValueError(f"{where} is {described(value)}; expected one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class TrainConfig(Ranged):
    """What is computed; the defaults are the paper's student's."""

    steps: int
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # learning rate rises linearly from 0
    cosine_decay: bool = False  # then falls to 0 along a half cosine, or stays
    ema_decay: float = 0.9999
    grad_clip: float = 1.0  # 2-norm over all parameters; .inf for no limit
    seed: int = 0
    log_every: int = 25  # steps per line of the log; each line holds the means since the line before

    RANGES: ClassVar = {
        "steps": COUNT,
        "batch_size": "[1, 65536]",
        "learning_rate": "[0, 10]",
        "betas": "[0, 1)",
        "weight_decay": "[0, inf)",
        "warmup_steps": "[0, 1000000000]",
        "ema_decay": "[0, 1)",
        "grad_clip": "(0, inf]",
        "seed": SEED,
        "log_every": COUNT,
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        super().__post_init__()

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
class ExecutionConfig(Ranged):
    """How it is computed; the values here change results by rounding at most (bf16's, for `precision`)."""

    strategy: str = "ddp"  # or "fsdp": weights, gradients, optimizer and EMA sharded (FSDP2)
    precision: str = "fp32"  # or "bf16": autocast; weights, optimizer and EMA stay float32
    accumulation: int = 1  # micro-batches per step and process
    activation_checkpointing: bool = False  # blocks keep their inputs only and run again in backward
    compile: bool = False  # torch.compile each block
    save_every: int = 5000  # steps between checkpoints; one is written at the end too
    keep_last: int = 3  # checkpoints
    tensorboard: bool = False  # besides log.jsonl

    RANGES: ClassVar = {"accumulation": "[1, 65536]", "save_every": COUNT, "keep_last": COUNT}

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"strategy": (self.strategy, STRATEGIES), "precision": (self.precision, PRECISIONS)}
        _require_one_of("execution", known)


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
class TeacherConfig(Ranged):
    """The weights to distil; and, for `ard teacher`, how to make some."""

    checkpoint: str | None = None  # public DiT checkpoint, diffusers folder, or run of `ard teacher`
    label_dropout: float = 0.1  # share of labels replaced by the null label
    train: TrainConfig | None = None

    RANGES: ClassVar = {"label_dropout": "[0, 1]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "teacher", ("checkpoint",))


@dataclass(frozen=True)
class TrajectoriesConfig(Ranged):
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

    RANGES: ClassVar = {
        "count": COUNT,
        "shard_size": COUNT,
        "batch_size": "[1, 65536]",
        "seed": SEED,
        "sampling_steps": f"[1, {TRAIN_STEPS}]",
        "cfg_scale": "[0, inf)",
        "cfg_channels": "[0, 1024]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "trajectories", ("folder",))
        _require_one_of(
            "trajectories", {"dtype": (self.dtype, list(DTYPES)), "precision": (self.precision, PRECISIONS)}
        )
        try:
            check_keep(tuple(self.keep), self.sampling_steps)
        except ValueError as error:
            raise ValueError(f"trajectories.{error}") from None
        if not self.store or len(set(self.store)) < len(self.store) or not set(self.store) <= set(STATE_KINDS):
            kinds = ", ".join(map(repr, STATE_KINDS))
            got = described(list(self.store))
            raise ValueError(f"trajectories.store is {got}; expected one or both of {kinds}, each once")
        if math.ceil(self.count / self.shard_size) > LARGEST_SHARDS:
            raise ValueError(
                f"trajectories.shard_size is {self.shard_size} of count={self.count}; expected at most "
                f"{LARGEST_SHARDS} shards"
            )


@dataclass(frozen=True)
class StudentConfig(Ranged):
    """The student; its steps are the trajectories' ``keep``."""

    history_layers: int = 6
    window: int | None = None
    sink: int = 0
    state: str = "x0"  # or "ode"

    RANGES: ClassVar = {"history_layers": "[0, 1024]", "window": "[1, 1000]", "sink": "[0, 1000]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_one_of("student", {"state": (self.state, STATE_KINDS)})


@dataclass(frozen=True)
class PreviewConfig(Ranged):
    """Grids of samples and their Frechet distance to the teacher, during training, by the averaged weights."""

    every: int  # steps; 0 for never
    count: int = 1024  # samples
    batch_size: int = 64  # of one process
    grid: int = 64  # samples shown
    features: str = "pooled"  # see `ard.features.load_features`
    vae: str | None = None  # decodes latents for grid and features

    RANGES: ClassVar = {"every": "[0, 1000000000]", "count": COUNT, "batch_size": "[1, 65536]", "grid": "[1, 65536]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "preview", ("vae",))


@dataclass(frozen=True)
class GanConfig(Ranged):
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

    RANGES: ClassVar = {
        "discriminator_learning_rate": "[0, 10]",
        "discriminator_betas": "[0, 1)",
        "start": "[0, 1000000000]",
        "factor": "[0, inf)",
        "largest_weight": "[0, inf)",
        "feature_timestep": f"[0, {TRAIN_STEPS - 1}]",
        "projection": "[1, 65536]",
        "kernel_size": "[1, 65536]",
        "virtual_batch": "[1, 65536]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "gan", ("student", "real"))
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

    def __post_init__(self) -> None:
        model, trajectories, student = self.model, self.trajectories, self.student
        most = {
            "trajectories.cfg_channels": (trajectories.cfg_channels, f"model.in_channels={model.in_channels}"),
            "student.history_layers": (student.history_layers, f"model.depth={model.depth}"),
        }
        for name, (value, limit) in most.items():
            if value > int(limit.rpartition("=")[2]):
                raise ValueError(f"{name} is {value}; expected at most {limit}")
        if student.state not in trajectories.store:
            store = list(trajectories.store)
            raise ValueError(f"student.state is {student.state!r}; expected one of trajectories.store={store}")
        if self.gan and self.gan.kernel_size // 2 > model.tokens:
            raise ValueError(
                f"gan.kernel_size is {self.gan.kernel_size}; expected at most {2 * model.tokens + 1}, which wraps "
                f"around the {model.tokens} tokens once"
            )

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

    Raises ValueError on an unknown key (naming the nearest valid one), a missing key, or a value of the wrong type or
    outside its range.
    """
    values = {key: value for key, value in read_values(source).items() if key not in FOREIGN_SECTIONS}
    for override in overrides:
        values = merge(values, parse_override(Recipe, override))
    return build(Recipe, values)


def read_values(source: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with those it extends under it; relative names are beside it.

    above: the files that extend this one.
    """
    shipped = {path.stem: path for path in sorted(Path(str(files("ard") / "configs")).glob("*.yaml"))}
    path = shipped.get(str(source), Path(source))
    if not path.exists():
        raise ValueError(
            f"config: no such file and no shipped recipe {described(str(source))}; expected a YAML file or one of "
            + ", ".join(shipped)
        )
    if path.resolve() in above:
        raise ValueError(f"config: {path} extends itself, by way of {', '.join(other.name for other in above)}")
    from ard.yaml_files import read_yaml  # what trains without a recipe does without PyYAML

    values = read_yaml(path)
    base = values.pop("extends", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: extends is {described(base)}; expected the name of a YAML file beside it")
    if base is None:
        return values
    return merge(read_values(base if base in shipped else path.parent / base, (*above, path.resolve())), values)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal one."""
    import yaml

    write_text(path, yaml.safe_dump(plain(recipe), sort_keys=False))


def plain(config: Any) -> dict[str, Any]:
    """A config as mappings, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, tuple) else value

    return convert(dataclasses.asdict(config))
