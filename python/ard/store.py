"""On-disk store of teacher trajectories, and the seeded order in which training reads them.

A store is one folder:

    manifest.json              what was asked for (``StoreSpec``) and the shards that are complete
    shard-00000.safetensors    noise (n, *image), x0 (n, S, *image), ode (n, S, *image), labels (n,) int64
    shard-00001.safetensors    ...

Every file is written to a temporary name, flushed to disk and renamed, and a shard enters the manifest, with its
sha256, only after its rename. A killed generation leaves complete shards; running it again writes the missing ones.

Noise and label of sample ``i`` are pure functions of ``(seed, i)``: they do not depend on the batch size, the shard
size, or the number of samples. So is the training order: position ``p`` of the endless sample stream is a pure
function of ``(seed, p)``, whatever the batch size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ard.files import file_sha256, write_json, write_tensors

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TENSOR_NAMES = ("noise", "x0", "ode", "labels")

# One Philox key per use of randomness: streams with the same seed never overlap.
STREAMS = {"noise": 1, "order": 2, "teacher": 3}


def random_stream(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """The generator of ``(seed, stream, index)``.

    The index sits in the high word of Philox's 256-bit counter, so the streams of two indices cannot meet
    (a Mersenne Twister seeded by a hash would collide after ~2**16 indices).
    """
    if stream not in STREAMS:
        raise ValueError(f"random_stream: stream is {stream!r}; expected one of {sorted(STREAMS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"random_stream: seed={seed}, index={index}; expected both >= 0")
    return np.random.Generator(np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, index]))


def noise_at(seed: int, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, float32 (len(indices), *shape); row i depends on (seed, indices[i]) only."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices):
        noise[row] = random_stream(seed, "noise", int(index)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(noise)


@functools.lru_cache(maxsize=4)
def _epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return random_stream(seed, "order", epoch).permutation(count)


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> torch.Tensor:
    """Sample indices (batch_size,) int64 of training step ``step`` over ``count`` samples.

    The stream visits all samples once per epoch, in an order drawn from (seed, epoch); a batch may span two epochs.
    """
    if count < 1:
        raise ValueError(f"batch_indices: count={count}; expected at least one sample")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = [_epoch_permutation(seed, int(p // count), count)[p % count] for p in positions]
    return torch.from_numpy(np.array(indices, dtype=np.int64))


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds. Two stores with equal specs hold the same trajectories."""

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

    def __post_init__(self):
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("count", "shard_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"StoreSpec: {name}={getattr(self, name)}; expected >= 1")

    @property
    def shards(self) -> int:
        return math.ceil(self.count / self.shard_size)

    def fingerprint(self) -> str:
        """12 hexadecimal digits that differ between specs; a name for the store's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def shard_range(self, shard: int) -> range:
        """Global indices of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def noise(self, indices: Sequence[int]) -> torch.Tensor:
        """Noise of global indices, float32 (n, *image_shape)."""
        return noise_at(self.seed, indices, self.image_shape)

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        """Labels of global indices, int64 (n,): all classes equally often."""
        return torch.tensor([int(index) % self.num_classes for index in indices], dtype=torch.int64)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def generate_store(
    folder: Path,
    spec: StoreSpec,
    make_batch: Callable[[torch.Tensor, torch.Tensor], object],
    *,
    batch_size: int = 256,
    on_progress: Callable[[int], None] | None = None,
) -> TrajectoryStore:
    """Generates the missing shards of ``spec`` and opens the store.

    folder: made if absent; if it holds a store, its spec must equal ``spec``.
    make_batch: (noise (n, *image), labels (n,)) -> an object with attributes noise, x0, ode, labels
        (``ard.trajectories.generate`` with the teacher bound).
    on_progress: called with the number of trajectories just finished (whole shards when they were there already).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder) if (folder / MANIFEST_NAME).exists() else _new_manifest(spec)
    _require_same_spec(folder, StoreSpec(**manifest["spec"]), spec)
    report = on_progress or (lambda count: None)
    for shard in range(spec.shards):
        name, indices = shard_name(shard), spec.shard_range(shard)
        if name in manifest["shards"] and (folder / name).exists():
            report(len(indices))
            continue
        parts = []
        for first in range(indices.start, indices.stop, batch_size):
            rows = range(first, min(first + batch_size, indices.stop))
            batch = make_batch(spec.noise(rows), spec.labels(rows))
            parts.append({tensor: getattr(batch, tensor) for tensor in TENSOR_NAMES})
            report(len(rows))
        tensors = {tensor: torch.cat([part[tensor] for part in parts]) for tensor in TENSOR_NAMES}
        sha256 = write_tensors(folder / name, tensors)
        manifest["shards"][name] = {"first": indices.start, "count": len(indices), "sha256": sha256}
        write_json(folder / MANIFEST_NAME, manifest)
    return TrajectoryStore(folder)


def _new_manifest(spec: StoreSpec) -> dict:
    return {"format": "ard-trajectories", "version": FORMAT_VERSION, "spec": asdict(spec), "shards": {}}


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise FileNotFoundError(f"TrajectoryStore: {folder} has no {MANIFEST_NAME}; expected a trajectory store")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != "ard-trajectories" or manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"TrajectoryStore: {path} says format={manifest.get('format')!r}, version={manifest.get('version')!r}; "
            f"expected 'ard-trajectories', {FORMAT_VERSION}"
        )
    return manifest


def _require_same_spec(folder: Path, stored: StoreSpec, asked: StoreSpec) -> None:
    for name, value in asdict(asked).items():
        if getattr(stored, name) != value:
            raise ValueError(
                f"generate_store: {folder} holds trajectories with {name}={getattr(stored, name)!r}; expected {value!r}"
            )


class TrajectoryStore:
    """A complete store, opened for reading. Tensors are memory-mapped: only the rows that are read enter memory."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.spec = StoreSpec(**manifest["spec"])
        self.shards: dict[str, dict] = manifest["shards"]
        missing = [
            name for name in map(shard_name, range(self.spec.shards))
            if name not in self.shards or not (self.folder / name).exists()
        ]  # fmt: skip
        if missing:
            raise ValueError(
                f"TrajectoryStore: {self.folder} lacks {len(missing)} of {self.spec.shards} shards, "
                f"first {missing[0]}; run the generation again to finish it"
            )
        self._maps: dict[tuple[int, str], torch.Tensor] = {}

    def __len__(self) -> int:
        return self.spec.count

    def verify(self) -> None:
        """Raises ValueError naming every shard whose content differs from the manifest's sha256."""
        broken = [name for name, entry in self.shards.items() if file_sha256(self.folder / name) != entry["sha256"]]
        if broken:
            raise ValueError(
                f"TrajectoryStore: {self.folder}: sha256 differs from the manifest for {', '.join(broken)}"
            )

    def read(self, name: str, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``indices`` (n,) of tensor ``name`` (noise, x0, ode or labels), copied to memory in the order asked.

        out: tensor to copy them to, of any strides.
        """
        if name not in TENSOR_NAMES:
            raise ValueError(f"TrajectoryStore.read: name is {name!r}; expected one of {TENSOR_NAMES}")
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(
                f"TrajectoryStore.read: indices span [{int(indices.min())}, {int(indices.max())}]; "
                f"expected within [0, {len(self) - 1}]"
            )
        shards = indices // self.spec.shard_size
        first = self._map(0, name)
        rows = torch.empty((len(indices), *first.shape[1:]), dtype=first.dtype) if out is None else out
        for shard in shards.unique().tolist():
            # NumPy copies whole rows; an indexed copy of PyTorch goes by elements and takes four times as long.
            here = (shards == shard).numpy()
            rows.numpy()[here] = self._map(shard, name).numpy()[indices.numpy()[here] - shard * self.spec.shard_size]
        return rows

    def pairs(self, indices: torch.Tensor, state: str = "x0") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(states, targets, labels) of a training batch.

        states (n, S, *image): segment 0 the noise, segment s the state that ends step s; targets (n, S, *image): the
        state each segment must predict; labels (n,). state: "x0" (the teacher's x0-predictions) or "ode" (the ODE's).
        """
        if state not in ("x0", "ode"):
            raise ValueError(f"TrajectoryStore.pairs: state is {state!r}; expected 'x0' or 'ode'")
        targets = self.read(state, indices)
        states = torch.empty_like(targets)
        self.read("noise", indices, out=states[:, 0])
        states[:, 1:] = targets[:, :-1]
        return states, targets, self.read("labels", indices)

    def _map(self, shard: int, name: str) -> torch.Tensor:
        # safetensors maps the file for CPU tensors: get_tensor reads no data, indexing it reads the touched pages.
        if (shard, name) not in self._maps:
            with safe_open(self.folder / shard_name(shard), framework="pt", device="cpu") as file:
                self._maps[shard, name] = file.get_tensor(name)
        return self._maps[shard, name]
