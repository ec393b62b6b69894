"""Real images as latents: an image folder encoded once through a VAE, into the store that the GAN fine-tune reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import LATER, fingerprint
from ard.common.streams import noise_at
from ard.conditions.prompts import read_caption
from ard.conditions.sources import ConditionSource, Prompts, source_for
from ard.config.choices import DTYPES
from ard.data.real_images import image_files, load_image
from ard.models.config import Condition, Conditioned, ModelConfig, condition_tensors
from ard.storage.files import write_json
from ard.storage.shards import ShardedStore, ShardSpec, Tensors, write_shards
from ard.weights.vae import LatentCodec

DIGITS = "digits"
SKIPPED_NAME = "skipped.json"


@dataclass(frozen=True)
class LatentSpec(Conditioned, ShardSpec):
    """What a store of real latents holds."""

    count: int
    shard_size: int
    image_shape: tuple[int, int, int]  # (channels, height, width) of a latent
    conditions: tuple[Condition, ...]
    source: str  # what was encoded: sha256 of the list of files, their sizes, times and labels, or a name
    encoder: str  # fingerprint of the VAE, or "none"
    seed: int = 0  # of the posterior's noise
    dtype: str = "float32"
    # fingerprint of the source of the conditions, where they are numbers of prompts
    prompts: str | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("image_shape", "conditions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_conditions()
        if self.dtype not in DTYPES:
            raise ValueError(f"LatentSpec: dtype={self.dtype!r}; expected one of {sorted(DTYPES)}")

    def fingerprint(self) -> str:
        return fingerprint(self)

    @property
    def row_bytes(self) -> int:
        beside = sum(condition.row_bytes for condition in self.conditions)
        return math.prod(self.image_shape) * DTYPES[self.dtype].itemsize + beside

    def tensors(self, rows: int) -> Tensors:
        """What a shard of so many latents holds."""
        latents = {"latents": (DTYPES[self.dtype], (rows, *self.image_shape))}
        return {**latents, **condition_tensors(self.conditions, rows)}


class LatentStore(ShardedStore):
    """Tensors latents (n, c, h, w) of real images, and their conditions (n, ...) by name."""

    KIND = "latents"

    def __init__(self, folder: Path):
        super().__init__(folder, self.KIND, LatentSpec)


def write_latents(
    folder: Path,
    spec: LatentSpec,
    encode: Callable[[range], tuple[Tensor, ...]],
    *,
    batch_size: int = 64,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> LatentStore:
    """Writes the missing shards of a store of latents and opens it.

    encode: range of indices -> (latents, *conditions).
    """

    def make_rows(indices: range) -> dict[str, Tensor]:
        latents, *conditions = encode(indices)
        latents = latents.to("cpu", DTYPES[spec.dtype])
        if not latents.isfinite().all():
            raise ValueError(
                f"write_latents: latents {indices.start} to {indices.stop - 1} are not finite as {spec.dtype}; "
                "expected finite latents"
            )
        return {"latents": latents, **{each.name: x.cpu() for each, x in zip(spec.conditions, conditions, strict=True)}}

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


class RealLatents(Protocol):
    """What the generator is compared with; ``fingerprint`` differs between sets."""

    fingerprint: str

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents (n, c, h, w), and their conditions (n, ...)."""


class StoredLatents:
    """Rows of a store of real latents; source: of their conditions."""

    def __init__(self, store: LatentStore, source: ConditionSource | None = None):
        shards = sorted((name, entry["content_sha256"]) for name, entry in store.shards.items())
        self.store = store
        self.fingerprint = hashlib.sha256(f"{store.spec.fingerprint()} {shards}".encode()).hexdigest()
        self.source = source_for(store.spec.conditions, store.spec.prompts, source)

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        stored = (self.store.read(condition.name, indices) for condition in self.store.spec.conditions)
        return self.store.read("latents", indices), self.source.tensors(*stored)


class LatentsInMemory:
    """Rows of tensors, under a name."""

    def __init__(self, fingerprint: str, latents: Tensor, *conditions: Tensor):
        self.fingerprint, self.latents, self.conditions = fingerprint, latents, conditions

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.latents[indices], tuple(condition[indices] for condition in self.conditions)


def encode_folder(
    images: Path,
    codec: LatentCodec,
    folder: Path,
    *,
    size: int,
    num_classes: int = 1000,
    captions: Prompts | None = None,
    seed: int = 0,
    dtype: str = "float16",
    shard_size: int = 4000,
    batch_size: int = 64,
    skip: Mapping[str, str] | None = None,
    process: Process | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> LatentStore:
    """Encodes every image, scaled and cropped to ``size``, and writes a store of latents; continues after a kill.

    images: <class folder>/<image>, labels by the folders' sorted order, as in ImageNet. Each latent is one draw of
    the posterior, a function of (seed, index).
    captions: encoded prompts, one of which stands in the .txt file beside each image; its number is kept, no label.
    skip: images to leave out and why, of `damaged_images`; they are listed in skipped.json in ``folder``. None: no
    image may be damaged, and no list is written.
    """
    files = [(path, label) for path, label in image_files(images) if str(path.relative_to(images)) not in (skip or ())]
    if not files:
        raise ValueError(f"{images} holds no image that can be read; expected one at least")
    if captions is None:
        labels = torch.tensor([label for _, label in files])
        stored: tuple[Condition, ...] = (Condition("labels", classes=num_classes),)
        if int(labels.max()) >= num_classes:
            raise ValueError(f"{images} has {int(labels.max()) + 1} class folders; expected at most {num_classes}")
    else:
        labels = torch.tensor([captions.number(read_caption(path.with_suffix(".txt"))) for path, _ in files])
        files, stored = [(path, n) for (path, _), n in zip(files, labels.tolist(), strict=True)], captions.stored
    listed = "\n".join(f"{path.relative_to(images)} {_state(path)} {label}" for path, label in files)
    shape = codec.latent_shape(torch.empty(1, 3, size, size, device="meta"))[1:]
    spec = LatentSpec(
        count=len(files),
        shard_size=shard_size,
        image_shape=shape,
        conditions=stored,
        prompts=None if captions is None else captions.fingerprint,
        source=hashlib.sha256(f"{size}\n{listed}".encode()).hexdigest(),
        encoder=codec.fingerprint,
        seed=seed,
        dtype=dtype,
    )

    def encode(indices: range) -> tuple[Tensor, Tensor]:
        pictures = torch.stack([load_image(files[index][0], size) for index in indices])
        return codec.encode(pictures, noise_at(seed, indices, shape, "posterior")), labels[list(indices)]

    store = write_latents(folder, spec, encode, batch_size=batch_size, process=process, on_progress=on_progress)
    if skip is not None and (process or Process()).is_main:
        write_json(folder / SKIPPED_NAME, {"count": len(skip), "images": dict(skip)})
    return store


def _state(path: Path) -> str:
    """Size and time of change: reading every image anew takes too long, and what is written anew has another time."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def damaged_images(
    images: Path, size: int, process: Process | None = None, on_progress: Callable[[int], Any] | None = None
) -> dict[str, str]:
    """Images of a folder that `load_image` refuses, by their path in it, and why; every rank tries its share."""
    process, files = process or Process(), image_files(images)
    damaged = torch.zeros(len(files), dtype=torch.uint8)
    own = process.share(torch.arange(len(files)))
    for index in own.tolist():
        damaged[index] = _reason(files[index][0], size) is not None
        if on_progress:
            on_progress(process.world_size)
    found = process.gather(damaged[own].to(process.device)).nonzero().flatten().tolist()
    return {str(files[index][0].relative_to(images)): _reason(files[index][0], size) or "" for index in found}


def _reason(path: Path, size: int) -> str | None:
    try:
        load_image(path, size)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def open_real(source: str, config: ModelConfig, conditions: ConditionSource) -> RealLatents:
    """Real latents by name: "digits", or the folder of a store of latents of the model's shape.

    conditions: where the model's come from.
    """
    if source == DIGITS:
        from ard.data import digits

        data = digits.load()
        real: RealLatents = LatentsInMemory(DIGITS, data.train_images, data.train_labels)
        shape, stored = digits.IMAGE_SHAPE, (Condition("labels", classes=digits.NUM_CLASSES),)
    else:
        store = LatentStore(Path(source))
        shape, stored = store.spec.image_shape, store.spec.conditions
    if shape != config.image_shape:
        raise ValueError(f"{source} holds latents of shape {shape}; expected the model's {config.image_shape}")
    if stored != conditions.stored:
        found, expected = (", ".join(map(str, each)) for each in (stored, conditions.stored))
        raise ValueError(f"{source} has {found}; expected the model's {expected}")
    return real if source == DIGITS else StoredLatents(store, conditions)
