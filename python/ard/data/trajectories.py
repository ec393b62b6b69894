"""Stores of teacher trajectories, which the student is distilled from.

Noise and conditions of trajectory ``i`` are pure functions of ``(seed, i)``: they do not depend on the batch size, the
shard size, the number of samples or of processes. The format on disk is that of `ard.storage.shards`. What is kept of
the conditions, and what stands for them, is the matter of a `ConditionSource`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import LATER, fingerprint
from ard.common.streams import noise_at
from ard.conditions.sources import ConditionSource, named, source_for
from ard.config.choices import DTYPES, STATE_KINDS, check_keep
from ard.diffusion.trajectories import TrajectoryBatch
from ard.models.config import Condition, Conditioned, condition_tensors
from ard.storage.shards import ShardedStore, ShardSpec, Tensors, shard_count, write_shards


@dataclass(frozen=True)
class StoreSpec(Conditioned, ShardSpec):
    """What a trajectory store holds. Two stores with equal specs hold the same trajectories."""

    count: int  # trajectories
    shard_size: int  # trajectories per shard; the last shard may be smaller
    seed: int  # of the noise
    image_shape: tuple[int, int, int]  # (channels, height, width)
    conditions: tuple[Condition, ...]  # as they are stored
    sampling_steps: int  # teacher steps
    keep: tuple[int, ...]  # indices of the steps whose states are stored, noisiest first
    cfg_scale: float
    cfg_channels: int
    cfg_interval: tuple[float, float] | None = None
    family: str = "dit"
    model: str = ""  # fingerprint of its config: no tensor shows the number of heads
    # fingerprint of the source of the conditions, where they are numbers of prompts
    prompts: str | None = field(default=None, metadata=LATER)
    negative_prompt: str | None = field(default=None, metadata=LATER)  # in place of the null conditions
    solver: str = "ddim"
    shift: float = 0.0
    teacher_sha256: str = ""  # of the teacher's weights
    store: tuple[str, ...] = STATE_KINDS  # state kinds
    dtype: str = "float32"  # of noise and states
    precision: str = "fp32"  # of the teacher's forward

    def __post_init__(self) -> None:
        for name in ("image_shape", "conditions", "keep", "store"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_conditions()
        for name in ("count", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"StoreSpec: {name}={getattr(self, name)}; expected >= 1")
        check_keep(self.keep, self.sampling_steps)
        if not self.store or not set(self.store) <= set(STATE_KINDS):
            raise ValueError(f"StoreSpec: store={list(self.store)}; expected one or both of {list(STATE_KINDS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"StoreSpec: dtype={self.dtype!r}; expected one of {sorted(DTYPES)}")

    @property
    def shards(self) -> int:
        return shard_count(self)

    @property
    def row_bytes(self) -> int:
        """Bytes of one trajectory: noise, the states of each kind, the conditions."""
        states = 1 + len(self.keep) * len(self.store)
        beside = sum(condition.row_bytes for condition in self.conditions)
        return states * math.prod(self.image_shape) * DTYPES[self.dtype].itemsize + beside

    def fingerprint(self) -> str:
        return fingerprint(self)

    def tensors(self, rows: int) -> Tensors:
        """What a shard of so many trajectories holds."""
        dtype, states = DTYPES[self.dtype], (rows, len(self.keep), *self.image_shape)
        images = {"noise": (dtype, (rows, *self.image_shape)), **{name: (dtype, states) for name in self.store}}
        return {**images, **condition_tensors(self.conditions, rows)}

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Noise of global indices, float32 (n, *image_shape)."""
        return noise_at(self.seed, indices, self.image_shape)


def states_of_batch(batch: TrajectoryBatch, spec: StoreSpec, indices: Sequence[int]) -> dict[str, Tensor]:
    """Noise and states of the trajectories of these indices, rounded as they are stored, on the batch's device.

    Raises ValueError where one is not finite.
    """
    rows = {name: getattr(batch, name).to(DTYPES[spec.dtype]) for name in ("noise", *spec.store)}
    if broken := [name for name, tensor in rows.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{', '.join(broken)} of the trajectories {min(indices)} to {max(indices)} are not finite as "
            f"{spec.dtype}; expected finite states"
        )
    return rows


LEAST_ROWS = 8
# (noise, *conditions) on any device -> trajectories
MakeBatch = Callable[..., TrajectoryBatch]


def generate_store(
    folder: Path,
    spec: StoreSpec,
    make_batch: MakeBatch,
    *,
    source: ConditionSource | None = None,
    batch_size: int = 256,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TrajectoryStore:
    """Generates the missing shards of ``spec``, every rank its share, and opens the store.

    folder: made if absent; if it holds a store, its spec must equal ``spec``.
    make_batch: (noise (n, *image), *conditions) -> trajectories: `ard.diffusion.generate` with the teacher bound.
    source: of the conditions; labels in turn by default.
    on_progress: see `ard.storage.shards.write_shards`.
    """
    source = source_for(spec.conditions, spec.prompts, source)

    def make_rows(indices: range) -> dict[str, Tensor]:
        stored = source.drawn(spec.seed, indices)
        rows = states_of_batch(make_batch(spec.noise(indices), *source.tensors(*stored)), spec, indices)
        return {**{name: tensor.cpu() for name, tensor in rows.items()}, **named(spec.conditions, stored)}

    write_shards(
        Path(folder),
        TrajectoryStore.KIND,
        spec,
        make_rows,
        batch_size=batch_size,
        row_bytes=spec.row_bytes,
        process=process,
        on_progress=on_progress,
    )
    return TrajectoryStore(folder, source)


class Trajectories(Protocol):
    """What training reads: a `TrajectoryStore`, or `OnlineTrajectories`."""

    spec: StoreSpec

    def __len__(self) -> int: ...

    def conditions(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The model's conditions (n, ...) of these trajectories."""

    def pairs(self, indices: Tensor, state: str = "x0") -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(states, targets, conditions) of a training batch.

        states (n, S, *image): segment 0 the noise, segment s the state that ends step s; targets (n, S, *image): the
        state each segment must predict. state: "x0" (the teacher's x0-predictions) or "ode" (the ODE's).
        """


class TrajectoryStore(ShardedStore):
    """Tensors noise (n, *image), x0 and/or ode (n, S, *image), and the conditions (n, ...) by name, as they are stored.

    source: of the conditions, without which those of a store of prompts stay numbers and are not given.
    """

    KIND = "trajectories"

    def __init__(self, folder: Path, source: ConditionSource | None = None):
        super().__init__(folder, self.KIND, StoreSpec)
        self._source = source

    def conditions(self, indices: Tensor) -> tuple[Tensor, ...]:
        source = source_for(self.spec.conditions, self.spec.prompts, self._source)
        return source.tensors(*(self.read(condition.name, indices) for condition in self.spec.conditions))

    def pairs(self, indices: Tensor, state: str = "x0") -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """See `Trajectories`; float32 or float16, as stored."""
        require_stored(self.spec, state)
        targets = self.read(state, indices)
        states = torch.empty_like(targets)
        self.read("noise", indices, out=states[:, 0])
        states[:, 1:] = targets[:, :-1]
        return states, targets, self.conditions(indices)


class OnlineTrajectories:
    """Trajectories made when they are asked for: the noise, conditions and states that a store of ``spec`` would hold.

    make_batch: as in `generate_store`; it gets ``batch_size`` rows at a time, and LEAST_ROWS at least, the last one
    repeated: on a CPU other matrix products take fewer rows, and round otherwise. Results are on ``device``.
    """

    def __init__(
        self,
        spec: StoreSpec,
        make_batch: MakeBatch,
        batch_size: int,
        device: torch.device,
        source: ConditionSource | None = None,
    ):
        self.spec, self._make_batch, self._batch_size, self._device = spec, make_batch, batch_size, device
        self._source = source_for(spec.conditions, spec.prompts, source)

    def __len__(self) -> int:
        return self.spec.count

    def pairs(self, indices: Tensor, state: str = "x0") -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        require_stored(self.spec, state)
        with torch.autocast(self._device.type, enabled=False):  # the student's: the teacher has its own
            parts = [self._rows(part.tolist()) for part in indices.split(self._batch_size)]
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            targets = rows[state]
            states = torch.cat([rows["noise"][:, None], targets[:, :-1]], dim=1)
        return states, targets, self.conditions(indices)

    def conditions(self, indices: Tensor) -> tuple[Tensor, ...]:
        tensors = self._source.tensors(*self._source.drawn(self.spec.seed, indices.tolist()))
        return tuple(tensor.to(self._device) for tensor in tensors)

    def _rows(self, indices: list[int]) -> dict[str, Tensor]:
        filled = indices + indices[-1:] * (LEAST_ROWS - len(indices))
        batch = self._make_batch(self.spec.noise(filled).to(self._device), *self.conditions(torch.tensor(filled)))
        return {name: rows[: len(indices)] for name, rows in states_of_batch(batch, self.spec, indices).items()}


def require_stored(spec: StoreSpec, state: str) -> None:
    """Raises ValueError unless ``spec`` holds this kind of state."""
    if state not in spec.store:
        raise ValueError(f"trajectories: state is {state!r}; expected one of {spec.store}, as stored")
