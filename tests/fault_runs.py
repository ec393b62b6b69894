"""A tiny training run and a tiny trajectory store, made in processes that tests kill.

The processes are forked from one that has imported torch and has never computed: starting one takes milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ard.common.process import Process
from ard.config.sections import ExecutionConfig, TrainConfig
from ard.data.trajectories import StoreSpec, TrajectoryStore, generate_store
from ard.models.config import Condition
from ard.storage import checkpoints
from ard.storage.files import read_sealed_json
from ard.storage.shards import MANIFEST_NAME
from ard.training.log import LOG_NAME
from ard.training.objectives import MicroBatch, Objective
from ard.training.run_state import Run
from ard.training.trainer import Fitted, Trainer
from torch import Tensor, nn

Report = Callable[[Any], Any]
CPU = torch.device("cpu")

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["torch._dynamo", "torch.distributed", "ard.demo.run", "ard.cli", "pytest"])

SPEC = StoreSpec(
    count=23,
    shard_size=8,
    seed=3,
    image_shape=(1, 4, 4),
    conditions=(Condition("labels", classes=23),),  # the label of a sample is its index
    sampling_steps=25,
    keep=(15, 10, 0),
    cfg_scale=1.5,
    cfg_channels=1,
)


class Toy(Objective):
    """Regression, with a tensor of its own that must survive too."""

    def __init__(self, device: torch.device):
        super().__init__(count=10, seed=3)
        draw = torch.Generator().manual_seed(0)
        self.inputs, self.targets = (torch.randn(10, width, generator=draw).to(device) for width in (3, 2))
        self.updates = torch.zeros((), dtype=torch.int64)

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        return (model(self.inputs[micro.indices]) - self.targets[micro.indices]).square().mean(1)

    def update(self) -> None:
        self.updates += 1

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"objective": {"updates": self.updates}}

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        self.updates = read("objective")["updates"]


def toy_trainer(
    folder: Path | None, steps: int = 6, *, save_every=1, keep_last=3, resume=True, device=CPU, **changes
) -> Trainer:
    """A model with buffers and dropout; a line of the log every 2 steps. changes: of the TrainConfig."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).to(device)
    config = TrainConfig(**{"steps": steps, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, **changes})
    run = Run(folder, {"kind": "toy"}, {"train": config.identity()}, resume) if folder else None
    execution = ExecutionConfig(save_every=save_every, keep_last=keep_last)
    return Trainer(model, Toy(device), config, execution=execution, process=Process(device=device), run=run)


def train(folder: Path, report: Report = bool, **settings) -> Fitted:
    """Trains a toy to the end; reports the updates done after each, when its checkpoint is saved."""
    return toy_trainer(folder, **settings).fit(on_step=report)


@pytest.fixture
def in_memory(tmp_path):
    """In place of tmp_path: for a killed process, unlike for a machine without power, fsyncs would prove nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# For `dying`: amid the writing of every file (0) takes seconds, at every third change on disk or at each minutes.
DEATHS = [
    pytest.param(0, id="torn"),
    pytest.param(3, id="every third", marks=pytest.mark.slow),
    pytest.param(1, id="every", marks=pytest.mark.exhaustive),
]
SAVES = 200


def save_many(folder: Path, report: Report) -> None:
    """Checkpoints as fast as it goes, of which one is kept."""
    os.fsync = bool  # the disk is not what is tested
    for step in range(1, SAVES + 1):
        checkpoints.save(folder, step, {"a": {"x": torch.full((1 << 15,), float(step))}}, {}, keep_last=1)


def snapshot(folder: Path) -> dict[str, Any]:
    """Content of every file of a run or store by its path; without the log's speeds, which no two runs share."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if LOG_NAME in content:
        lines = [json.loads(line) for line in content[LOG_NAME].splitlines()]
        content[LOG_NAME] = [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]
    return content


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def damages(content: bytes) -> Iterator[bytes]:
    """A file's content with one bit flipped, one in each byte of JSON or of a safetensors' header and in 200 places
    more, and cut off."""
    draw = random.Random(0)
    header = len(content) if content[:1] == b"{" else 8 + int.from_bytes(content[:8], "little")
    bits = [8 * byte + draw.randrange(8) for byte in range(header)] + draw.sample(range(8 * len(content)), 200)
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
    for length in {0, 1, 7, 8, 9, header - 1, header // 2, len(content) // 2, len(content) - 1}:
        yield content[:length]


def rewrite(path: Path, content: bytes) -> None:
    """Another file under the same name; to cut off and rewrite the same one makes some filesystems flush it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def trajectories(noise: Tensor, labels: Tensor) -> SimpleNamespace:
    """Trajectories that are a function of the noise row alone."""
    scales = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    return SimpleNamespace(noise=noise, x0=noise[:, None] * scales, ode=noise[:, None] + scales, conditions=(labels,))


def generate(
    folder: Path, report: Report = bool, *, process: Process | None = None, batch_size: int = 4, **changes
) -> TrajectoryStore:
    """Generates a store; reports the indices of each batch of samples when it is about to be made."""

    def make_batch(noise: Tensor, labels: Tensor) -> SimpleNamespace:
        report(labels.tolist())
        return trajectories(noise, labels)

    return generate_store(folder, replace(SPEC, **changes), make_batch, batch_size=batch_size, process=process)


def generate_as(rank: int, world_size: int, meeting: Path, folder: Path, report: Report) -> None:
    """`generate` as one of several processes, which meet over a file."""
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
    generate(folder, report, process=Process(rank, world_size))
    torch.distributed.destroy_process_group()


def finished_samples(folder: Path, shard_size: int = SPEC.shard_size) -> set[int]:
    """Indices of the samples in shards that count as written."""
    manifest = folder / MANIFEST_NAME
    entries = list(read_sealed_json(manifest)["shards"].values()) if manifest.exists() else []
    entries += [read_sealed_json(path) for path in folder.glob("shard-*.json")]
    return {index for entry in entries for index in range(entry["first"], entry["first"] + entry["count"])}


class Child:
    """``work(*args, report)`` in a process of its own; the values it reports are kept here."""

    def __init__(self, work: Callable[..., Any], *args: Any):
        self._receiver, sender = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_child, args=(sender, work, args))
        self._process.start()
        sender.close()
        self._receiver.recv()  # it is about to begin

    def kill_after(self, seconds: float | None) -> tuple[list[Any], bool]:
        """(reports, whether it was finished before). None: waits for its end."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        reports = self.reports()
        if self._process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the child has failed with exit code {self._process.exitcode}")
        return reports, self._process.exitcode == 0

    def report(self) -> Any:
        """The next one; waits for it."""
        return self._receiver.recv()

    def reports(self) -> list[Any]:
        """What is left of them, of a process that has ended."""
        reports = []
        while True:
            try:
                reports.append(self._receiver.recv())
            except (EOFError, OSError):  # the end, or a report that a kill has cut off
                return reports

    def end(self, seconds: float | None, number: int) -> int:
        """Its exit status; the signal is sent after so many seconds, if it is still there. None: waits for its end."""
        self._process.join(seconds)
        if self._process.is_alive():
            os.kill(self._process.pid, number)
        self._process.join(60)
        assert not self._process.is_alive(), f"signal {number} did not end it"
        return self._process.exitcode

    def alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        """Kills it; how it has ended, if it has, does not matter."""
        self._process.kill()
        self._process.join()


def _child(sender: Connection, work: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # kills are counted in milliseconds: a GPU takes seconds to begin
    torch.set_num_threads(1)
    sender.send("ready")
    work(*args, sender.send)


def dying(work: Callable[..., Any], number: int, torn: bool, *args: Any) -> Any:
    """``work(*args)`` in a process that kills itself just before its ``number``-th change on disk.

    A change: mkdir, rename, unlink, rmdir, opening for writing, and fsync, which is where what was written counts; just
    before one is just after the one before. torn: counts the flushed files only, and cuts the file to half its size,
    as if the kill had come amid its writing.
    """
    left = number

    def tick() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hook(event: str, values: tuple) -> None:
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            tick()

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if torn and not stat.S_ISREG(status.st_mode):
            return
        if torn and left == 0:
            os.truncate(f"/proc/self/fd/{descriptor}", status.st_size // 2)
        tick()

    sys.dont_write_bytecode = True
    os.fsync = fsync  # for a killed process, unlike for a machine without power, what was written is written
    if not torn:
        sys.addaudithook(hook)
    return work(*args)
