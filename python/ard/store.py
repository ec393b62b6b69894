"""Stores of teacher trajectories, which the student is distilled from, and of real latents, which the GAN compares to.

Noise and label of trajectory ``i`` are pure functions of ``(seed, i)``: they do not depend on the batch size, the
shard size, the number of samples or of processes. The format on disk is that of ``ard.shards``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.parallel import Process
from ard.shards import ShardedStore, shard_count, write_shards
from ard.streams import noise_at
from ard.trajectories import STATE_KINDS, TrajectoryBatch, check_keep

DTYPES = {"float32": torch.float32, "float16": torch.float16}
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by name


def fingerprint(spec: Any) -> str:
    """12 hexadecimal digits that differ between specs; a name for a store's folder."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class StoreSpec:
    """What a trajectory store holds. Two stores with equal specs hold the same trajectories."""

    count: int  # trajectories
    shard_size: int  # trajectories per shard; the last shard may be smaller
    seed: int  # of the noise
    image_shape: tuple[int, int, int]  # (channels, height, width)
    num_classes: int  # label of sample i is i mod num_classes
    sampling_steps: int  # respaced teacher steps
    keep: tuple[int, ...]  # respaced indices of the stored states, noisiest first
    cfg_scale: float
    cfg_channels: int
    teacher_sha256: str = ""  # of the teacher's weights
    store: tuple[str, ...] = STATE_KINDS  # state kinds
    dtype: str = "float32"  # of noise and states
    precision: str = "fp32"  # of the teacher's forward

    def __post_init__(self) -> None:
        for name in ("image_shape", "keep", "store"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("count", "shard_size", "num_classes"):
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
        """Bytes of one trajectory: noise, the states of each kind, the label."""
        states = 1 + len(self.keep) * len(self.store)
        return states * math.prod(self.image_shape) * DTYPES[self.dtype].itemsize + torch.int64.itemsize

    def fingerprint(self) -> str:
        return fingerprint(self)

    def tensors(self, rows: int) -> Tensors:
        """What a shard of so many trajectories holds."""
        dtype, states = DTYPES[self.dtype], (rows, len(self.keep), *self.image_shape)
        images = {"noise": (dtype, (rows, *self.image_shape)), **{name: (dtype, states) for name in self.store}}
        return {**images, "labels": (torch.int64, (rows,))}

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Noise of global indices, float32 (n, *image_shape)."""
        return noise_at(self.seed, indices, self.image_shape)

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels of global indices, int64 (n,): all classes equally often."""
        return torch.tensor([int(index) % self.num_classes for index in indices], dtype=torch.int64)


def generate_store(
    folder: Path,
    spec: StoreSpec,
    make_batch: Callable[[Tensor, Tensor], TrajectoryBatch],
    *,
    batch_size: int = 256,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TrajectoryStore:
    """Generates the missing shards of ``spec``, every rank its share, and opens the store.

    folder: made if absent; if it holds a store, its spec must equal ``spec``.
    make_batch: (noise (n, *image), labels (n,)) -> trajectories: ``ard.trajectories.generate`` with the teacher bound.
    on_progress: see `ard.shards.write_shards`.
    """

    def make_rows(indices: range) -> dict[str, Tensor]:
        batch = make_batch(spec.noise(indices), spec.labels(indices))
        rows = {name: getattr(batch, name).to("cpu", DTYPES[spec.dtype]) for name in ("noise", *spec.store)}
        broken = [name for name, tensor in rows.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(
                f"generate_store: {', '.join(broken)} of the trajectories {indices.start} to {indices.stop - 1} "
                f"are not finite as {spec.dtype}; expected finite states"
            )
        return {**rows, "labels": batch.labels.cpu()}

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
    return TrajectoryStore(folder)


class TrajectoryStore(ShardedStore):
    """Tensors noise (n, *image), x0 and/or ode (n, S, *image), labels (n,) int64."""

    KIND = "trajectories"

    def __init__(self, folder: Path):
        super().__init__(folder, self.KIND, StoreSpec)

    def pairs(self, indices: Tensor, state: str = "x0") -> tuple[Tensor, Tensor, Tensor]:
        """(states, targets, labels) of a training batch.

        states (n, S, *image): segment 0 the noise, segment s the state that ends step s; targets (n, S, *image): the
        state each segment must predict; labels (n,). state: "x0" (the teacher's x0-predictions) or "ode" (the ODE's).
        """
        if state not in self.spec.store:
            raise ValueError(f"TrajectoryStore.pairs: state is {state!r}; expected one of {self.spec.store}, as stored")
        targets = self.read(state, indices)
        states = torch.empty_like(targets)
        self.read("noise", indices, out=states[:, 0])
        states[:, 1:] = targets[:, :-1]
        return states, targets, self.read("labels", indices)


@dataclass(frozen=True)
class LatentSpec:
    """What a store of real latents holds."""

    count: int
    shard_size: int
    image_shape: tuple[int, int, int]  # (channels, height, width) of a latent
    num_classes: int
    source: str  # what was encoded: sha256 of the list of files and labels, or a name
    encoder: str  # fingerprint of the VAE, or "none"
    seed: int = 0  # of the posterior's noise
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"LatentSpec: dtype={self.dtype!r}; expected one of {sorted(DTYPES)}")

    def fingerprint(self) -> str:
        return fingerprint(self)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.image_shape) * DTYPES[self.dtype].itemsize + torch.int64.itemsize

    def tensors(self, rows: int) -> Tensors:
        """What a shard of so many latents holds."""
        return {"latents": (DTYPES[self.dtype], (rows, *self.image_shape)), "labels": (torch.int64, (rows,))}


class LatentStore(ShardedStore):
    """Tensors latents (n, c, h, w) and labels (n,) int64 of real images."""

    KIND = "latents"

    def __init__(self, folder: Path):
        super().__init__(folder, self.KIND, LatentSpec)


def write_latents(
    folder: Path,
    spec: LatentSpec,
    encode: Callable[[range], tuple[Tensor, Tensor]],
    *,
    batch_size: int = 64,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> LatentStore:
    """Writes the missing shards of a store of latents and opens it. encode: range of indices -> (latents, labels)."""

    def make_rows(indices: range) -> dict[str, Tensor]:
        latents, labels = encode(indices)
        latents = latents.to("cpu", DTYPES[spec.dtype])
        if not latents.isfinite().all():
            raise ValueError(
                f"write_latents: latents {indices.start} to {indices.stop - 1} are not finite as {spec.dtype}; "
                "expected finite latents"
            )
        return {"latents": latents, "labels": labels.cpu()}

    write_shards(
        Path(folder),
        LatentStore.KIND,
        spec,
        make_rows,
        batch_size=batch_size,
        row_bytes=spec.row_bytes,
        process=process,
        on_progress=on_progress,
    )
    return LatentStore(folder)
