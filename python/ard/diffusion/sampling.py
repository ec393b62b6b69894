"""Samples of a student into files: images as ADM-format .npz with a PNG grid, or latents as safetensors.

They are made in shards, in a folder beside the file, which is put together in the end: a killed command goes on.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import COUNT, SEED, Ranged, fingerprint
from ard.common.streams import noise_at
from ard.conditions.sources import Classes, Prompts, named
from ard.config.choices import autocast
from ard.models.config import Condition, Conditioned, condition_tensors
from ard.models.student import ARDStudent
from ard.storage.files import FolderLock, file_sha256, remove_folder, remove_temporary, write_json, write_tensors
from ard.storage.images import (
    SAMPLE_NAME,
    SAMPLE_PARTS,
    latent_preview,
    read_sample_json,
    to_uint8,
    write_grid,
    write_npz,
    write_png,
)
from ard.storage.shards import MANIFEST_NAME, ShardedStore, ShardSpec, Tensors, write_shards
from ard.weights.opened import state_sha256
from ard_kernels.common.arguments import described

IMAGE_CHANNELS = (1, 3)  # a student of other channels makes latents
GRID_SAMPLES = 100
LARGEST_CLASS = 999_999  # of what a model may have

FILES = "samples.npz", "samples.safetensors"  # of images, of latents
PICTURES = "images"  # the folder of PNGs
LEAST_SHARD = 64  # samples


class Codec(Protocol):
    """Such as `ard.weights.vae.LatentCodec`."""

    fingerprint: str
    downsampling: int  # image pixels per latent pixel along a side

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images in [-1, 1]."""


@dataclass(frozen=True)
class SamplingConfig(Ranged):
    count: int
    batch_size: int = 64  # of one process
    seed: int = 0  # of the noise; sample i's is a function of (seed, i)
    classes: tuple[int, ...] = ()  # or numbers of prompts, in turn; all, if empty
    precision: str = "fp32"  # or "bf16"
    cuda_graph: bool = True  # on a GPU: one launch per batch

    RANGES: ClassVar = {"count": COUNT, "batch_size": "[1, 65536]", "seed": SEED, "classes": f"[0, {LARGEST_CLASS}]"}


@dataclass(frozen=True)
class SampleSpec(Conditioned, ShardSpec):
    """What the shards hold: who asks for the same goes on with them."""

    count: int
    shard_size: int
    image_shape: tuple[int, int, int]  # (h, w, c) uint8 of images, (c, h, w) float32 of latents
    pixels: bool  # images
    conditions: tuple[Condition, ...]
    seed: int
    classes: tuple[int, ...]
    precision: str
    model: str  # fingerprint of the config
    weights_sha256: str
    history_layers: int
    window: int | None
    sink: int
    timesteps: tuple[float, ...] | None
    codec: str  # fingerprint
    prompts: str | None = None  # fingerprint of their store

    def tensors(self, rows: int) -> Tensors:
        kind = torch.uint8 if self.pixels else torch.float32
        return {"images": (kind, (rows, *self.image_shape)), **condition_tensors(self.conditions, rows)}


def write_samples(
    student: ARDStudent,
    folder: Path,
    config: SamplingConfig,
    *,
    prompts: Prompts | None = None,
    codec: Codec | None = None,
    facts: dict[str, Any] | None = None,
    fresh: bool = False,
    process: Process | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Samples, every rank its share, into samples.npz (or .safetensors), grid.png and sample.json in ``folder``.

    Goes on where an equal call was killed, and samples nothing where one has finished. prompts: of a student that is
    steered by text; its images stand in ``folder`` one by one, too, as images/<number of the prompt>-<sample>.png.
    codec: decodes latents; a student of pixels needs none. facts: for sample.json. fresh: replaces what is there.
    Returns sample.json's content; "images_per_second" is of all processes, without start and writing, None if nothing
    was left to sample. Raises ValueError where ``folder`` holds other samples.
    """
    process = process or Process()
    shape = student.config.image_shape
    source = prompts or Classes(student.config.conditions)
    source.in_turn(range(1), config.classes)  # raises for a class that is none
    pixels = codec is not None or student.config.in_channels in IMAGE_CHANNELS
    scale, channels = (codec.downsampling, 3) if codec else (1, shape[0])
    image_shape = (shape[1] * scale, shape[2] * scale, channels) if pixels else shape
    run = sampler(student, config, process.device)
    spent = [0.0, 0]  # seconds, samples

    def make_rows(indices: range) -> dict[str, Tensor]:
        stored = source.in_turn(indices, config.classes)
        noise, started = noise_at(config.seed, indices, shape), time.perf_counter()
        states = run(*(tensor.to(process.device) for tensor in (noise, *source.tensors(*stored))))
        images = codec.decode(states) if codec else states
        if not images.isfinite().all():
            raise ValueError(f"samples {indices.start} to {indices.stop - 1} are not finite; expected finite ones")
        images = torch.from_numpy(to_uint8(images)) if pixels else images.cpu()
        spent[0] += time.perf_counter() - started
        spent[1] += len(indices)
        return {"images": images, **named(spec.conditions, stored)}

    spec = SampleSpec(
        count=config.count,
        shard_size=config.batch_size * math.ceil(LEAST_SHARD / config.batch_size),
        image_shape=image_shape,
        pixels=pixels,
        conditions=source.stored,
        seed=config.seed,
        classes=config.classes,
        precision=config.precision,
        model=fingerprint(student.config),
        weights_sha256=state_sha256(student.state_dict()),
        history_layers=student.routing.history_layers,
        window=student.routing.window,
        sink=student.routing.sink,
        timesteps=student.segment_times,
        codec=codec.fingerprint if codec else "none",
        prompts=source.fingerprint,
    )
    name, parts = FILES[0] if pixels else FILES[1], folder / SAMPLE_PARTS
    identity = fingerprint(replace(spec, shard_size=1))  # which no sample depends on
    # Twice on disk: in a shard and in the file.
    sizes = {"batch_size": config.batch_size, "row_bytes": 2 * math.prod(image_shape) * (1 if pixels else 4)}
    with FolderLock(folder) if process.is_main else nullcontext():
        finished = _begin(folder, name, identity, fresh, process)
        if finished is not None:
            if on_progress:
                on_progress(config.count)
            return finished
        write_shards(parts, "samples", spec, make_rows, **sizes, process=process, on_progress=on_progress)
        seconds, made = process.gather(torch.tensor([spent])).T
        content = {
            **(facts or {}),
            "file": name,
            "spec": identity,
            "count": config.count,
            "seed": config.seed,
            **({"prompts": prompts.texts} if prompts else {}),
            "classes": list(config.classes) or "all",  # or numbers of the prompts
            "steps": student.steps,
            "precision": config.precision,
            "processes": process.world_size,
            "device": process.device.type,
            "images_per_second": float(made.sum() / seconds.max()) if made.any() else None,
        }
        if process.is_main:
            _assemble(folder, content, config.batch_size, prompts is not None and pixels)
        process.barrier()
    return content


def _begin(folder: Path, name: str, identity: str, fresh: bool, process: Process) -> dict[str, Any] | None:
    """What sample.json says, where the same samples are there; else the folder is ready for `write_shards`."""
    parts = folder / SAMPLE_PARTS
    begun = (parts / MANIFEST_NAME).exists()  # of which samples, `write_shards` asks
    finished = None if fresh or begun else _finished(folder, name, identity)
    process.barrier()  # all ranks have seen the same; now it may change
    if process.is_main:
        remove_temporary(folder)
        if parts.exists() and (fresh or not begun):
            remove_folder(parts)
    process.barrier()
    return finished


def _finished(folder: Path, name: str, identity: str) -> dict[str, Any] | None:
    """What sample.json says of the same samples; None if there are none, or damaged ones. ValueError for others."""
    said = folder / SAMPLE_NAME
    if not any((folder / known).exists() for known in (SAMPLE_NAME, *FILES)):
        return None
    content = read_sample_json(said) if said.exists() else {}
    if content.get("spec") != identity:
        raise ValueError(
            f"{folder} holds samples of other settings or weights, as {SAMPLE_NAME} says; expected another folder, or "
            "--fresh to replace them"
        )
    whole = (folder / name).is_file() and content.get("sha256") == file_sha256(folder / name)
    return {**content, "images_per_second": None} if whole else None


def _assemble(folder: Path, content: dict[str, Any], batch_size: int, one_by_one: bool) -> None:
    """The files of ``folder`` from its shards, which are removed; the last is sample.json: ``content``, a sha256.

    one_by_one: a PNG of each sample, too.
    """
    parts, path = ShardedStore(folder / SAMPLE_PARTS, "samples", SampleSpec), folder / content["file"]
    parts.verify()
    every = torch.arange(len(parts))
    conditions = {condition.name: parts.read(condition.name, every) for condition in parts.spec.conditions}
    shown = parts.read("images", every[:GRID_SAMPLES])
    if path.suffix == ".npz":
        batches = (parts.read("images", rows).numpy() for rows in every.split(batch_size))
        labels = conditions.get("labels", conditions.get("prompt"))
        write_npz(path, batches, len(parts), labels=None if labels is None else labels.numpy())
    else:
        write_tensors(path, {"images": parts.read("images", every), **conditions})
        shown = torch.from_numpy(to_uint8(latent_preview(shown)))
    write_grid(folder / "grid.png", shown.numpy(), columns=round(len(shown) ** 0.5))
    for other in set(FILES) - {path.name}:
        (folder / other).unlink(missing_ok=True)
    remove_pictures(folder / PICTURES)
    if one_by_one:
        write_pictures(folder / PICTURES, parts, conditions["prompt"], batch_size)
    content["sha256"] = file_sha256(path)
    write_json(folder / SAMPLE_NAME, content)
    remove_folder(folder / SAMPLE_PARTS)


def remove_pictures(folder: Path) -> None:
    """Those that `write_pictures` has written there, if any."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\d{5,}-\d{6,}\.png", path.name, re.ASCII):
            path.unlink()


def write_pictures(folder: Path, parts: ShardedStore, prompts: Tensor, batch_size: int) -> None:
    """images/<number of the prompt>-<sample>.png, of five and six digits."""
    folder.mkdir(exist_ok=True)
    for rows in torch.arange(len(parts)).split(batch_size):
        for row, image in zip(rows.tolist(), parts.read("images", rows).numpy(), strict=True):
            write_png(folder / f"{int(prompts[row]):05d}-{row:06d}.png", image)


def sampler(student: ARDStudent, config: SamplingConfig, device: torch.device) -> Callable[..., Tensor]:
    """(noise, *conditions) -> final states (n, c, h, w) float32; on a GPU whole batches replay one CUDA graph."""
    context = autocast(config.precision, device)

    def run(noise: Tensor, *conditions: Tensor) -> Tensor:
        with torch.no_grad(), context():
            return student.sample(noise, *conditions)[:, -1].float()

    if device.type != "cuda" or not config.cuda_graph:
        return run
    replay = None

    def run_or_replay(noise: Tensor, *conditions: Tensor) -> Tensor:
        nonlocal replay
        if len(noise) != config.batch_size:
            return run(noise, *conditions)
        replay = replay or graphed(run, noise, *conditions)
        return replay(noise, *conditions)

    return run_or_replay


def graphed(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """``run`` captured once, for inputs of these shapes, and replayed."""
    held, device = [tensor.clone() for tensor in inputs], inputs[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tunes every kernel that the capture will launch
            run(*held)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = run(*held)

    def replay(*new: Tensor) -> Tensor:
        for tensor, value in zip(held, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        return states.clone()

    return replay


def parse_classes(text: str) -> tuple[int, ...]:
    """ "0,5,10-12" -> (0, 5, 10, 11, 12)."""
    classes: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, re.ASCII)
        if not match:
            raise ValueError(f"classes: got {described(text)}; expected numbers and ranges such as 0,5,10-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"classes: got the range {part!r}; expected it to ascend")
        if last > LARGEST_CLASS or len(classes) + last - first > LARGEST_CLASS:
            raise ValueError(f"classes: got {described(text)}; expected at most {LARGEST_CLASS}, and as many")
        classes += range(first, last + 1)
    return tuple(classes)
