"""Sections of a recipe: frozen dataclasses whose defaults are the paper's, each checked where it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ard.common.settings import COUNT, SEED, Ranged, expand_paths
from ard.config.choices import (
    DTYPES,
    PRECISIONS,
    SOLVERS,
    STATE_KINDS,
    STRATEGIES,
    TIMES,
    check_keep,
    require_one_of,
)
from ard.models.convention import TRAIN_STEPS
from ard_kernels.common.arguments import described

LARGEST_SHARDS = 100_000  # their names have five digits


@dataclass(frozen=True)
class TrainConfig(Ranged):
    """What is computed; the defaults are the paper's student's."""

    steps: int
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # the learning rate is multiplied by (step + 1) / warmup_steps until that is 1
    cosine_decay: bool = False  # it is multiplied by a half cosine from 1 at the first step to 0 after the last, too
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
        require_one_of("execution", known)


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

    checkpoint: str | None = None  # public checkpoint, diffusers folder, or run of `ard teacher`
    label_dropout: float = 0.1  # share of labels replaced by the null label
    train: TrainConfig | None = None

    RANGES: ClassVar = {"label_dropout": "[0, 1]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "teacher", ("checkpoint",))


@dataclass(frozen=True)
class TrajectoriesConfig(Ranged):
    """What `ard trajectories` samples from the teacher, or `ard distill` as it goes."""

    folder: str | None  # the store
    count: int
    shard_size: int
    batch_size: int  # of one process
    seed: int  # of the noise, and of the order of prompts
    prompts: str | None = None  # store of `ard prompts encode`, for a family that is steered by text
    negative_prompt: str | None = None  # of that store, in place of the model's null conditions; "" is the empty one
    online: bool = False  # made by `ard distill`, batch by batch, and not stored
    sampling_steps: int = 25  # teacher steps
    keep: tuple[int, ...] = (15, 10, 5, 0)  # steps whose states are the student's targets, counted down to the last, 0
    solver: str | None = None  # ddim; or euler, heun, midpoint; the usual one of the teacher's schedule by default
    shift: float = 0.0  # of the grid of times; 0 for none
    cfg_scale: float = 1.5
    cfg_channels: int = 3  # guided latent channels
    cfg_interval: tuple[float, float] | None = None  # times between which guidance applies
    store: tuple[str, ...] = ("x0",)  # state kinds
    dtype: str = "float16"
    precision: str = "fp32"  # of the teacher's forward

    RANGES: ClassVar = {
        "count": COUNT,
        "shard_size": COUNT,
        "batch_size": "[1, 65536]",
        "seed": SEED,
        "sampling_steps": f"[1, {TRAIN_STEPS}]",
        "shift": "[0, 1000]",
        "cfg_scale": "[0, inf)",
        "cfg_channels": "[0, 1024]",
        "cfg_interval": "(-inf, inf)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "trajectories", ("folder", "prompts"))
        known = {"dtype": (self.dtype, list(DTYPES)), "precision": (self.precision, PRECISIONS)}
        require_one_of("trajectories", {**known, "solver": (self.solver, (None, *SOLVERS))})
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
    times: str | None = None  # of its segments: "even" from noise to data, as published students of DiT have them, or
    # "kept", those of the states they read; by default even under DDPM and kept on the linear path

    RANGES: ClassVar = {"history_layers": "[0, 1024]", "window": "[1, 1000]", "sink": "[0, 1000]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("student", {"state": (self.state, STATE_KINDS), "times": (self.times, (None, *TIMES))})


@dataclass(frozen=True)
class PreviewConfig(Ranged):
    """Grids of samples and their Frechet distance to the teacher, during training, by the averaged weights."""

    every: int  # steps; 0 for never
    count: int = 1024  # samples
    batch_size: int = 64  # of one process
    grid: int = 64  # samples shown
    features: str = "pooled"  # see `ard.evaluation.features.load_features`
    vae: str | None = None  # decodes latents for grid and features

    RANGES: ClassVar = {
        "every": "[0, 1000000000]",
        "count": "[2, 1000000000]",  # of fewer there is no covariance
        "batch_size": "[1, 65536]",
        "grid": "[1, 65536]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "preview", ("vae",))


@dataclass(frozen=True)
class GanConfig(Ranged):
    """Fine-tune of a distilled student against heads on the frozen teacher's features ("R+G")."""

    train: TrainConfig
    student: str | None = None  # run or checkpoint of `ard distill`
    real: str | None = None  # store of `ard latents`, or "digits"
    captions: str | None = None  # store of their prompts, if it is not that of the trajectories
    discriminator_learning_rate: float = 1e-3
    discriminator_betas: tuple[float, float] = (0.9, 0.999)
    start: int = 3000  # steps before which the generator's weight is zero
    factor: float = 10.0  # on the adaptive weight
    largest_weight: float = 1e4  # of the adaptive weight, before the factor
    feature_timestep: float | None = None  # at which the teacher reads clean latents; that of the data by default
    projection: int = 64  # dimensions of the conditional projection
    kernel_size: int = 9  # of the residual convolution over tokens
    virtual_batch: int = 8  # consecutive samples of one process that share a batch norm's statistics

    RANGES: ClassVar = {
        "discriminator_learning_rate": "[0, 10]",
        "discriminator_betas": "[0, 1)",
        "start": "[0, 1000000000]",
        "factor": "[0, inf)",
        "largest_weight": "[0, inf)",
        "feature_timestep": "(-inf, inf)",
        "projection": "[1, 65536]",
        "kernel_size": "[1, 65536]",
        "virtual_batch": "[1, 65536]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "gan", ("student", "real", "captions"))
        if self.kernel_size % 2 == 0:
            raise ValueError(f"gan.kernel_size is {self.kernel_size}; expected an odd number")
