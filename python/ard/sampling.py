"""Samples of a student into files: images as ADM-format .npz with a PNG grid, or latents as safetensors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ard.config import COUNT, SEED, Ranged
from ard.files import atomic_path, file_sha256, write_json, write_tensors
from ard.images import latent_preview, to_uint8, write_grid, write_npz
from ard.parallel import Process
from ard.recipe import autocast
from ard.streams import noise_at
from ard.student import ARDStudent
from ard_kernels.arguments import described

IMAGE_CHANNELS = (1, 3)  # a student of other channels makes latents
GRID_SAMPLES = 100
LARGEST_CLASS = 999_999  # of what a model may have

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SamplingConfig(Ranged):
    count: int
    batch_size: int = 64  # of one process
    seed: int = 0  # of the noise; sample i's is a function of (seed, i)
    classes: tuple[int, ...] = ()  # in turn; all, if empty
    precision: str = "fp32"  # or "bf16"
    cuda_graph: bool = True  # on a GPU: one launch per batch

    RANGES: ClassVar = {"count": COUNT, "batch_size": "[1, 65536]", "seed": SEED, "classes": f"[0, {LARGEST_CLASS}]"}

    def labels(self, indices: Tensor, num_classes: int) -> Tensor:
        """Labels of global indices."""
        classes = torch.tensor(self.classes or tuple(range(num_classes)))
        if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
            raise ValueError(f"classes: got {described(self.classes)}; expected within [0, {num_classes - 1}]")
        return classes[indices % len(classes)]


def write_samples(
    student: ARDStudent,
    folder: Path,
    config: SamplingConfig,
    *,
    decode: Decode | None = None,
    facts: dict[str, Any] | None = None,
    process: Process | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Samples, every rank its share, into samples.npz (or .safetensors), grid.png and sample.json in ``folder``.

    decode: latents -> images in [-1, 1]; a student of pixels needs none. facts: for sample.json.
    Returns the content of sample.json; "images_per_second" is of all processes, without start and writing.
    """
    process = process or Process()
    indices = process.share(torch.arange(config.count))
    labels = config.labels(indices, student.config.num_classes)
    pixels = decode is not None or student.config.in_channels in IMAGE_CHANNELS
    run = sampler(student, config, process.device)
    folder.mkdir(parents=True, exist_ok=True)

    parts, seconds = [], 0.0
    for rows in torch.arange(len(indices)).split(config.batch_size):
        noise = noise_at(config.seed, indices[rows].tolist(), (student.config.in_channels, *student.config.input_hw))
        started = time.perf_counter()
        states = run(noise.to(process.device), labels[rows].to(process.device))
        images = decode(states) if decode else states
        parts.append(to_uint8(images) if pixels else images.cpu().numpy())
        seconds += time.perf_counter() - started
        if on_progress:
            on_progress(len(rows) * process.world_size)
    own = np.concatenate(parts) if parts else None
    path = folder / ("samples.npz" if pixels else "samples.safetensors")
    _write(path, own, config, student, process)
    slowest = float(process.gather(torch.tensor([seconds])).max())
    content = {
        **(facts or {}),
        "file": path.name,
        "count": config.count,
        "seed": config.seed,
        "classes": list(config.classes) or "all",
        "steps": student.steps,
        "precision": config.precision,
        "processes": process.world_size,
        "device": process.device.type,
        "images_per_second": config.count / slowest,
    }
    if process.is_main:
        shown = own[:GRID_SAMPLES] if pixels else to_uint8(latent_preview(torch.from_numpy(own[:GRID_SAMPLES])))
        write_grid(folder / "grid.png", shown, columns=round(len(shown) ** 0.5))
        content["sha256"] = file_sha256(path)
        write_json(folder / "sample.json", content)
    process.barrier()
    return content


def sampler(student: ARDStudent, config: SamplingConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(noise, labels) -> final states (n, c, h, w) float32; on a GPU whole batches replay one CUDA graph."""
    context = autocast(config.precision, device)

    def run(noise: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), context():
            return student.sample(noise, labels)[:, -1].float()

    if device.type != "cuda" or not config.cuda_graph:
        return run
    replay = None

    def run_or_replay(noise: Tensor, labels: Tensor) -> Tensor:
        nonlocal replay
        if len(noise) != config.batch_size:
            return run(noise, labels)
        replay = replay or graphed(run, noise, labels)
        return replay(noise, labels)

    return run_or_replay


def graphed(
    run: Callable[[Tensor, Tensor], Tensor], noise: Tensor, labels: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """``run`` captured once, for inputs of these shapes, and replayed."""
    noise, labels, device = noise.clone(), labels.clone(), noise.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tunes every kernel that the capture will launch
            run(noise, labels)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = run(noise, labels)

    def replay(new_noise: Tensor, new_labels: Tensor) -> Tensor:
        noise.copy_(new_noise)
        labels.copy_(new_labels)
        graph.replay()
        return states.clone()

    return replay


def _write(
    path: Path,
    own: np.ndarray | None,
    config: SamplingConfig,
    student: ARDStudent,
    process: Process,
) -> None:
    """All ranks' samples in rank order into one file; the other ranks hand theirs over as .npy beside it."""
    handed = [path.with_name(f".{path.name}.rank{rank}.npy") for rank in range(process.world_size)]
    if not process.is_main and own is not None:
        with atomic_path(handed[process.rank]) as temporary, open(temporary, "wb") as file:
            np.save(file, own, allow_pickle=False)
    process.barrier()
    if process.is_main:
        others = [part for part in handed[1:] if part.exists()]

        def batches() -> Iterator[np.ndarray]:
            for array in (own, *(np.load(part, mmap_mode="r", allow_pickle=False) for part in others)):
                for first in range(0, len(array), config.batch_size):
                    yield np.asarray(array[first : first + config.batch_size])

        every = config.labels(torch.arange(config.count), student.config.num_classes)
        if path.suffix == ".npz":
            write_npz(path, batches(), config.count, labels=every.numpy())
        else:
            images = np.concatenate(list(batches()))
            if len(images) != config.count:
                raise ValueError(f"{path}: the processes made {len(images)} samples; expected {config.count}")
            write_tensors(path, {"images": torch.from_numpy(images), "labels": every})
        for part in others:
            part.unlink()
    process.barrier()


def parse_classes(text: str) -> tuple[int, ...]:
    """ "0,5,10-12" -> (0, 5, 10, 11, 12)."""
    classes: list[int] = []
    for part in filter(None, text.split(",")):
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
