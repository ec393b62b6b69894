"""What a process does: the teacher and its trajectories; or one seed, from its student to the scores of rollouts."""

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


def make_student(seed: int, settings: Settings, folder: Path) -> tuple[VideoDiT, VideoDiT, list[float]]:
    """The teacher, the student that starts from its weights and follows its trajectories, and the student's losses."""
    teacher = VideoDiT()
    teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
    kept = Trajectories(**load_file(folder / "trajectories.safetensors"))
    student, began = copy.deepcopy(teacher), time.perf_counter()
    losses = student_losses(student, settings, kept, stream(seed, "student"))
    updates, rate = settings.student_updates, settings.student_rate
    log = fit(student, losses, updates, rate, lambda text: say(began, f"seed {seed}, student, {text}"))
    return teacher, student, log


def run_seed(seed: int, settings: Settings, folder: Path) -> dict:
    """A student and the rollouts of it and its teacher: `rows` (one per model and view), `losses`, `real`, `videos`."""
    torch.set_num_threads(1)
    cpu = time.process_time()
    real = digits.load()
    teacher, student, losses = make_student(seed, settings, folder)
    reader = Reader(real.train_images, real.train_labels)
    held_out = real.held_out_images, real.held_out_labels
    true, classes = clips(*held_out, settings.rollout, settings.streams, stream(seed, "first frames"))
    rows, videos = [], {"real": true}
    models = (("teacher", teacher, settings.teacher_steps), ("student", student, settings.student_steps))
    for model, network, steps in models:
        for view, (window, sink) in views(settings).items():
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
        "parameters": sum(p.numel() for p in student.parameters()),
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
