"""Every command that writes, stopped by SIGTERM, SIGINT and SIGKILL at drawn moments: continued, or refused by name.

What is on disk after a stop is never taken for finished by the command that reads it; the command given again until it
ends leaves what an undisturbed one does.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.data.digits import load
from ard.data.latents import LatentStore
from ard.data.trajectories import TrajectoryStore
from ard.weights.opened import open_source
from command_line import app, ard
from fault_runs import Child, in_memory, litter, snapshot
from PIL import Image

TINY = [
    "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "teacher.checkpoint=teacher",
    "teacher.train.steps=120", "teacher.train.batch_size=16", "trajectories.folder=trajectories",
    "trajectories.count=160", "trajectories.shard_size=8", "trajectories.batch_size=8",
    "trajectories.sampling_steps=8", "trajectories.keep=[6,4,2,0]", "student.history_layers=1",
    "distill.steps=60", "distill.batch_size=8", "distill.log_every=2", "execution.save_every=10", "preview.every=30",
    "preview.count=20", "preview.features=pooled", "gan.student=student", "gan.start=2", "gan.train.steps=40",
    "gan.train.batch_size=8", "gan.train.log_every=1",
]  # fmt: skip
DEMO = {
    "model": {"hidden_size": 16, "depth": 2, "num_heads": 2},
    "teacher": {"train": {"steps": 60, "batch_size": 16}},
    "trajectories": {"count": 60, "shard_size": 40, "batch_size": 20, "sampling_steps": 6, "keep": [3, 0]},
    "distill": {"steps": 30, "batch_size": 8, "log_every": 4},
    "gan": {"start": 2, "train": {"steps": 20, "batch_size": 8, "log_every": 2}},
    "demo": {
        "teacher_threads": 1,
        "classifier": {"steps": 40},
        "history_layers": [0, 1],
        "seeds": [0],
        "evaluation": {"count": 40, "batch_size": 25, "timing_batch_size": 4, "timing_repeats": 2},
    },
}
tmp_path = in_memory
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
ENDINGS = {
    signal.SIGTERM: (143, -signal.SIGTERM),  # by itself once training has saved; by the signal where nothing is lost
    signal.SIGINT: (130, 1),  # 1: Typer's "Aborted", before the command has begun
    signal.SIGKILL: (-signal.SIGKILL,),
}


class Vae:
    """In place of `ard.weights.vae.LatentCodec`."""

    fingerprint = "none"

    def __init__(self, *_, **__):
        pass

    def latent_shape(self, images):
        return len(images), 3, *images.shape[-2:]

    def encode(self, images, noise):
        return images + noise


def run(arguments: list[str], cwd: Path, report: Callable) -> None:
    """The command in this process, at sizes of shards and of the demo that the command line does not offer."""
    from ard.data import latents
    from ard.demo import run as demo
    from ard.weights import vae

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
    os.chdir(cwd)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    vae.LatentCodec = Vae
    latents.encode_folder.__kwdefaults__["shard_size"] = 4
    tiny = demo.load_config(changes=DEMO)
    demo.load_config = lambda *_, **__: tiny
    app(arguments)


@dataclass(frozen=True)
class Command:
    arguments: list[str]
    out: str
    finished: Callable[[Path], bool]  # whether what reads the output takes it


def opens(read: Callable) -> Callable[[Path], bool]:
    def finished(path: Path) -> bool:
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert any(why in str(error) for why in ("unfinished", "without a checkpoint")) or not list(path.glob("*"))
            return False
        return True

    return finished


def begun(read: Callable) -> Callable[[Path], bool]:
    """`opens` of what may not have its first file yet."""
    return lambda path: (path / "manifest.json").exists() and opens(read)(path)


COMMANDS = {
    "teacher": Command(["teacher", "-c", "digits", "--out", "out", *TINY], "out", opens(open_source)),
    "trajectories": Command(["trajectories", "-c", "digits", *TINY], "trajectories", begun(TrajectoryStore)),
    "distill": Command(["distill", "-c", "digits", "--out", "out", *TINY], "out", opens(open_source)),
    "finetune-gan": Command(["finetune-gan", "-c", "digits", "--out", "out", *TINY], "out", opens(open_source)),
    "latents": Command(
        ["latents", "images", "--vae", "vae", "--out", "out", "--size", "8", "--batch-size", "2"],
        "out",
        begun(LatentStore),
    ),
    "sample": Command(
        ["sample", "student", "--out", "out", "--count", "2000", "--batch-size", "32"],
        "out",
        lambda out: (out / "sample.json").exists(),
    ),
    "demo": Command(["demo", "--out", "out"], "out", lambda out: (out / "report.md").exists()),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        short = ["teacher.train.steps=5", "distill.steps=5", "preview.every=0"]
        for command in (["teacher", "--out", "teacher"], ["trajectories"], ["distill", "--out", "student"]):
            result = ard(command[0], "-c", "digits", *command[1:], *TINY, *short)
            assert result.exit_code == 0, result.output
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / "ab"[number % 2] / f"{number}.png")
    load()  # the digits, from scikit-learn's files
    return folder


def fresh(inputs: Path, folder: Path, name: str) -> Path:
    shutil.copytree(inputs, folder)
    if name == "trajectories":
        shutil.rmtree(folder / "trajectories")
    return folder


def product(folder: Path, name: str) -> dict:
    """The output, without seconds, and without checkpoints but the last: a stopped run has saved one of its own."""
    files = snapshot(folder / COMMANDS[name].out)
    last = max((path.split("/")[1] for path in files if path.startswith("checkpoints/")), default="")
    timed = ("sample.json", "report.json", "report.md")

    def kept(path: str) -> bool:
        top, _, below = path.partition("/")
        return path not in timed and "log.jsonl" not in path and (top != "checkpoints" or below.startswith(last))

    return {path: content for path, content in files.items() if kept(path)}


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("teacher", "sample")),
        *(pytest.param(name, 30, marks=pytest.mark.exhaustive) for name in COMMANDS),
    ],
)
def test_a_stopped_command_is_continued_or_refused(inputs, tmp_path, name, stops):
    command, draw, done = COMMANDS[name], random.Random(name), 0
    whole, began = fresh(inputs, tmp_path / "whole", name), time.perf_counter()
    assert Child(run, command.arguments, whole).end(None, signal.SIGKILL) == 0
    seconds, expected = time.perf_counter() - began, product(whole, name)
    assert command.finished(whole / command.out)
    folders = [fresh(inputs, tmp_path / "0", name)]
    numbers = [SIGNALS[i % 3] for i in range(stops)]
    while done < stops:
        folder, number = folders[-1], numbers[done]
        child, began = Child(run, command.arguments, folder), time.perf_counter()
        status = child.end(draw.uniform(0, seconds), number)
        if status == 0:
            assert command.finished(folder / command.out)
            seconds = min(seconds, time.perf_counter() - began)  # the first had a process to warm up
            folders.append(fresh(inputs, tmp_path / str(len(folders)), name))
            continue
        done += 1
        assert status in ENDINGS[number], f"{number!r} ended it with {status}"
        if command.finished(folder / command.out):  # the signal came between the last change on disk and the end
            assert product(folder, name) == expected or litter(folder)
    for folder in folders:
        assert Child(run, command.arguments, folder).end(None, signal.SIGKILL) == 0
        assert product(folder, name) == expected and command.finished(folder / command.out)


def test_an_unfinished_run_is_refused_and_taken_when_asked(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(fresh(inputs, tmp_path / "there", "trajectories"))
    run = ["teacher", "-c", "digits", "--out", "half", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr("ard.training.ema.Ema.update", lambda *_: signal.raise_signal(signal.SIGTERM))
        stopped = ard(*run)
    assert stopped.exit_code == 143
    assert "half: stopped at step 2 of 120 and saved; give the command again to continue" in stopped.output
    torch.set_num_threads(1)
    half = ["teacher.checkpoint=half"]
    short = ["distill.steps=2", "preview.every=0", "trajectories.folder=of-half"]
    for arguments in (
        ["trajectories", "-c", "digits", *TINY, *short, *half],
        ["distill", "-c", "digits", "--out", "s", *TINY, *short, *half],
        ["export", "half", "half.safetensors", "--to", "public"],
    ):
        before = sorted(os.listdir())
        refused = ard(*arguments)
        assert refused.exit_code == 1 and "half is unfinished, at step 2 of 120" in refused.output, refused.output
        assert sorted(os.listdir()) == before
        taken = ard(*arguments, "--unfinished")
        assert taken.exit_code == 0, taken.output
    chosen = ard("export", "half/checkpoints/step-00000002", "step.safetensors", "--to", "public")
    assert chosen.exit_code == 0, chosen.output
