"""The teacher by flow matching under teacher forcing, its trajectories, and a few-step student that follows them.

Teacher forcing puts the frames of a clip twice into one sequence, [clean | noisy]: a noisy frame sees the clean ones
before it and itself, and one forward trains every frame of the clip on its own past.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from model import Past, VideoDiT, times

from ard_kernels import SegmentMask


@dataclass(frozen=True)
class Settings:
    """Of the whole program; `--quick` takes QUICK. Frames of a clip are segments of one frame."""

    frames: int = 6  # of a training clip; the sink's distance is never longer than frames - 1
    window: int = 4  # frames, the own one included
    clips: int = 6  # of a batch
    teacher_updates: int = 800
    teacher_steps: int = 8  # Euler steps of its ODE
    batches_of_trajectories: int = 50
    student_updates: int = 250
    student_steps: int = 2
    rate: float = 3e-3
    student_rate: float = 5e-4
    streams: int = 16  # of a seed
    rollout: int = 200  # frames
    seeds: int = 3


QUICK = Settings(
    clips=4, teacher_updates=40, teacher_steps=4, batches_of_trajectories=4, student_updates=10,
    streams=4, rollout=16, seeds=1,
)  # fmt: skip


def views(settings: Settings) -> dict[str, tuple[int, int]]:
    """What a frame may see of the past: (window, sink), both counted in frames, as HistoryCache.rolling takes them."""
    return {"window + sink": (settings.window, 1), "window": (settings.window, 0), "no history": (1, 0)}


TURNS = ("window + sink", "window", "window + sink", "window", "no history")  # one a batch: the model learns every view


class Forcing:
    """The [clean | noisy] forward of a clip under one view."""

    def __init__(self, settings: Settings, view: str):
        frames, (window, sink) = settings.frames, views(settings)[view]
        # Both halves lie at the same places in time.
        self.past = Past(
            torch.arange(frames).repeat(2), mask=SegmentMask.teacher_forcing(frames, window=window, sink=sink)
        )
        self.first = [frame == 0 for frame in range(frames)] * 2

    def __call__(
        self, network: VideoDiT, clean: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """v (B, F, 32, 32) of the noisy half; clean, noisy (B, F, 32, 32), t (B, F), classes (B,)."""
        both, times = torch.cat((clean, noisy), 1), torch.cat((torch.zeros_like(t), t), 1)
        return network(both, times, classes, self.first, self.past)[:, t.shape[1] :]


@dataclass(frozen=True)
class Batch:
    """Forced frames: `clean` (B, F, 32, 32), `classes` (B,), `states` (steps + 1, B, F, 32, 32) of their ODEs."""

    view: str
    clean: torch.Tensor
    classes: torch.Tensor
    states: torch.Tensor


def fit(
    network: VideoDiT, losses_of: Iterator[torch.Tensor], updates: int, rate: float, say: Callable[[str], None]
) -> list[float]:
    """`updates` steps of AdamW on the losses that come, which it returns; `network` ends as a mean of its weights."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    mean = copy.deepcopy(parameters)
    losses, start = [], time.perf_counter()
    for update in range(updates):
        done = update / updates  # a tenth to warm up, then half a cosine
        optimizer.param_groups[0]["lr"] = rate * min(1, 10 * (done + 1 / updates)) * (1 + math.cos(math.pi * done)) / 2
        loss = next(losses_of)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, parameters, max(0.01, 1 / (1 + update)))
        losses.append(loss.item())
        if (update + 1) % max(1, updates // 5) == 0:
            recent = losses[-max(1, updates // 10) :]
            say(f"{update + 1:5d} updates, loss {sum(recent) / len(recent):.4f}, {time.perf_counter() - start:.0f} s")
    with torch.no_grad():
        torch._foreach_copy_(parameters, mean)
    return losses


def teacher_losses(
    network: VideoDiT, settings: Settings, draw: Callable, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Flow matching: x_t = (1 - t) data + t noise, v = noise - data, a t of its own for every frame."""
    forcing = {view: Forcing(settings, view) for view in TURNS}
    shape = (settings.clips, settings.frames)
    for update in range(settings.teacher_updates):
        clean, classes = draw(settings.clips, generator)
        t = (torch.randn(shape, generator=generator) + 1.2).sigmoid()  # where the digit goes is decided at a large t
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, t[..., None, None])
        v = forcing[TURNS[update % len(TURNS)]](network, clean, noisy, t, classes)
        yield (v - (noise - clean)).square().mean()


@torch.no_grad()
def make_trajectories(teacher: VideoDiT, settings: Settings, draw: Callable, generator: torch.Generator) -> list[Batch]:
    """The teacher's ODE of every frame given the clean ones before it, kept where the student's steps begin and end."""
    forcing = {view: Forcing(settings, view) for view in TURNS}
    grid, every = times(settings.teacher_steps), settings.teacher_steps // settings.student_steps
    batches = []
    for index in range(settings.batches_of_trajectories):
        view = TURNS[index % len(TURNS)]
        clean, classes = draw(settings.clips, generator)
        x = torch.randn(clean.shape, generator=generator)
        kept = [x]
        for step in range(1, len(grid)):
            t, after = grid[step - 1], grid[step]
            x = x - (t - after) * forcing[view](teacher, clean, x, t.expand(x.shape[:2]), classes)
            if step % every == 0:
                kept.append(x)
        batches.append(Batch(view, clean, classes, torch.stack(kept)))
    return batches


def student_losses(
    network: VideoDiT, settings: Settings, batches: list[Batch], generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """From a kept state to the next in a step: v is the teacher's mean velocity between; each frame draws its step."""
    forcing = {view: Forcing(settings, view) for view in TURNS}
    grid = times(settings.student_steps)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            batch = batches[index]
            step = torch.randint(settings.student_steps, batch.clean.shape[:2], generator=generator)
            clip, frame = torch.arange(step.shape[0])[:, None], torch.arange(step.shape[1])
            here, there = batch.states[step, clip, frame], batch.states[step + 1, clip, frame]
            t, after = grid[step], grid[step + 1]
            v = forcing[batch.view](network, batch.clean, here, t, batch.classes)
            yield (v - (here - there) / (t - after)[..., None, None]).square().mean()
