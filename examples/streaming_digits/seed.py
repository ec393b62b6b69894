"""What a process does: the teacher and its trajectories; or, for one seed, a model's rollouts and their scores."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from ard.data import digits
from model import VideoDiT
from moving import Reader, clips
from rollout import judge, roll
from safetensors.torch import load_file, save_file
from training import Settings, Trajectories, fit, make_trajectories, student_losses, teacher_losses, views

USES = ("weights", "teacher", "trajectories", "student", "first frames", "noise")


def stream(seed: int, use: str) -> torch.Generator:
    """Random numbers of their own for every seed and use."""
    return torch.Generator().manual_seed(len(USES) * seed + USES.index(use))


def say(began: float, text: str) -> None:
    print(f"{time.perf_counter() - began:5.0f} s: {text}", flush=True)


def make_teacher(settings: Settings, folder: Path) -> list[float]:
    """Trains the teacher and follows its ODEs; leaves both in `folder`, returns the losses."""
    began, real = time.perf_counter(), digits.load()

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return clips(real.train_images, real.train_labels, settings.frames, count, generator)

    torch.manual_seed(stream(0, "weights").initial_seed())
    teacher = VideoDiT()
    losses = teacher_losses(teacher, settings, draw, stream(0, "teacher"))
    log = fit(teacher, losses, settings.teacher_updates, settings.rate, lambda text: say(began, f"teacher, {text}"))
    kept = make_trajectories(teacher, settings, draw, stream(0, "trajectories"))
    say(began, f"trajectories of {settings.batches_of_trajectories} batches of {settings.clips} clips")
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    save_file(vars(kept), folder / "trajectories.safetensors")
    return log


def make_student(teacher: VideoDiT, seed: int, settings: Settings, folder: Path) -> tuple[VideoDiT, list[float]]:
    """What starts from the teacher's weights and follows its trajectories, and its losses."""
    kept = Trajectories(**load_file(folder / "trajectories.safetensors"))
    student, began = copy.deepcopy(teacher), time.perf_counter()
    losses = student_losses(student, settings, kept, stream(seed, "student"))
    updates, rate = settings.student_updates, settings.student_rate
    return student, fit(student, losses, updates, rate, lambda text: say(began, f"seed {seed}, student, {text}"))


def run(model: str, seed: int, settings: Settings, folder: Path) -> dict:
    """Rollouts of "teacher" or "student": `rows` (one per view), `losses`, `real`, `videos`."""
    torch.set_num_threads(1)
    cpu, real, losses = time.process_time(), digits.load(), []
    network, steps = VideoDiT(), settings.teacher_steps
    network.load_state_dict(load_file(folder / "teacher.safetensors"))
    if model == "student":
        (network, losses), steps = make_student(network, seed, settings, folder), settings.student_steps
    reader = Reader(real.train_images, real.train_labels)
    held_out = real.held_out_images, real.held_out_labels
    true, classes = clips(*held_out, settings.rollout, settings.streams, stream(seed, "first frames"))
    rows, videos = [], {"real": true}
    for view, (window, sink) in views(settings).items():
        if (model, window) == ("teacher", 1):
            continue  # it takes as long as the others, and the student's shows what comes of it
        made = roll(
            network, true[:, 0], classes, steps=steps, frames=settings.rollout, window=window, sink=sink,
            longest=settings.frames - 1, generator=stream(seed, "noise"),
        )  # fmt: skip
        scores = judge(made.video, classes, reader)
        row = {"model": model, "steps": steps, "view": view, "scores": scores}
        row["frames_per_second"] = settings.streams * (settings.rollout - 1) / made.seconds
        row["cache_bytes"] = made.cache_bytes[min(9, settings.rollout - 1)], made.cache_bytes[-1]
        rows.append(row)
        videos[f"{model}, {view}"] = made.video
        right = ", ".join(f"{100 * span['right']:.0f} % in {name}" for name, span in scores.items())
        print(f"seed {seed}: {model}, {view}: right digit {right}", flush=True)
    return {
        "rows": rows, "losses": losses, "real": judge(true, classes, reader), "videos": videos,
        "parameters": sum(p.numel() for p in network.parameters()),
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
