"""Real images as latents: an image folder encoded once through a VAE, into the store that the GAN fine-tune reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard import digits
from ard.files import write_json
from ard.gan import LatentsInMemory, RealLatents, StoredLatents
from ard.model_config import DiTConfig
from ard.parallel import Process
from ard.store import LatentSpec, LatentStore, write_latents
from ard.streams import noise_at
from ard.vae import LatentCodec, image_files, load_image

DIGITS = "digits"
SKIPPED_NAME = "skipped.json"


def encode_folder(
    images: Path,
    codec: LatentCodec,
    folder: Path,
    *,
    size: int,
    num_classes: int,
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
    skip: images to leave out and why, of `damaged_images`; they are listed in skipped.json in ``folder``. None: no
    image may be damaged, and no list is written.
    """
    files = [(path, label) for path, label in image_files(images) if str(path.relative_to(images)) not in (skip or ())]
    if not files:
        raise ValueError(f"{images} holds no image that can be read; expected one at least")
    labels = torch.tensor([label for _, label in files])
    if int(labels.max()) >= num_classes:
        raise ValueError(f"{images} has {int(labels.max()) + 1} class folders; expected at most {num_classes}")
    listed = "\n".join(f"{path.relative_to(images)} {path.stat().st_size} {label}" for path, label in files)
    shape = codec.latent_shape(torch.empty(1, 3, size, size, device="meta"))[1:]
    spec = LatentSpec(
        count=len(files),
        shard_size=shard_size,
        image_shape=shape,
        num_classes=num_classes,
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


def open_real(source: str, config: DiTConfig) -> RealLatents:
    """Real latents by name: "digits", or the folder of a store of latents of the model's shape."""
    if source == DIGITS:
        data = digits.load()
        real: RealLatents = LatentsInMemory(DIGITS, data.train_images, data.train_labels)
        shape, num_classes = digits.IMAGE_SHAPE, digits.NUM_CLASSES
    else:
        store = LatentStore(Path(source))
        real, shape, num_classes = StoredLatents(store), store.spec.image_shape, store.spec.num_classes
    expected = (config.in_channels, *config.input_hw)
    if tuple(shape) != expected:
        raise ValueError(f"{source} holds latents of shape {tuple(shape)}; expected the model's {expected}")
    if num_classes != config.num_classes:
        raise ValueError(f"{source} has {num_classes} classes; expected the model's {config.num_classes}")
    return real
