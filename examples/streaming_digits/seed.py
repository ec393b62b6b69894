"""One seed from its teacher to the scores of its rollouts."""

from __future__ import annotations

import copy
import time

import torch
from ard.data import digits
from model import VideoDiT
from moving import Reader, clips
from rollout import judge, roll
from training import Settings, fit, make_trajectories, student_losses, teacher_losses, views

USES = ("weights", "teacher", "trajectories", "student", "first frames", "noise")


def stream(seed: int, use: str) -> torch.Generator:
    """Random numbers of their own for every seed and use."""
    return torch.Generator().manual_seed(len(USES) * seed + USES.index(use))


def train(seed: int, settings: Settings, real: digits.Digits) -> tuple[dict[str, VideoDiT], dict[str, list[float]]]:
    """A teacher, and a student that starts from its weights and follows its trajectories; the losses of both."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"seed {seed}, {time.perf_counter() - began:4.0f} s: {text}", flush=True)

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return clips(real.train_images, real.train_labels, settings.frames, count, generator)

    torch.manual_seed(stream(seed, "weights").initial_seed())
    teacher = VideoDiT()
    losses = teacher_losses(teacher, settings, draw, stream(seed, "teacher"))
    teacher_log = fit(teacher, losses, settings.teacher_updates, settings.rate, lambda text: say(f"teacher, {text}"))
    batches = make_trajectories(teacher, settings, draw, stream(seed, "trajectories"))
    say(f"trajectories of {len(batches)} batches")
    student = copy.deepcopy(teacher)
    losses = student_losses(student, settings, batches, stream(seed, "student"))
    updates, rate = settings.student_updates, settings.student_rate
    student_log = fit(student, losses, updates, rate, lambda text: say(f"student, {text}"))
    return {"teacher": teacher, "student": student}, {"teacher": teacher_log, "student": student_log}


def run_seed(seed: int, settings: Settings) -> dict:
    """Training and rollouts of one seed: `rows` (one per model and view), `losses`, `real` scores, `videos`."""
    torch.set_num_threads(1)
    cpu = time.process_time()
    real = digits.load()
    networks, losses = train(seed, settings, real)
    reader = Reader(real.train_images, real.train_labels)
    held_out = real.held_out_images, real.held_out_labels
    true, classes = clips(*held_out, settings.rollout, settings.streams, stream(seed, "first frames"))
    rows, videos = [], {"real": true}
    for model, steps in (("teacher", settings.teacher_steps), ("student", settings.student_steps)):
        for view, (window, sink) in views(settings).items():
            made = roll(
                networks[model], true[:, 0], classes, steps=steps, frames=settings.rollout, window=window, sink=sink,
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
        "parameters": sum(p.numel() for p in networks["student"].parameters()),
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
