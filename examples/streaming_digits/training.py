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

    past_noise: float = 0.5  # how noisy the past may be in training
    past_lost: float = 0.15  # the share of its frames that are blank
    frames: int = 6  # of a training clip; the sink's distance is never longer than frames - 1
    window: int = 4  # frames, the own one included
    clips: int = 6  # of a batch
    teacher_updates: int = 1300
    teacher_steps: int = 8  # Euler steps of its ODE
    batches_of_trajectories: int = 40
    student_updates: int = 120
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


TURNS = (*("window + sink", "window") * 3, "no history")  # one a batch: the model learns every view


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
        self, network: VideoDiT, past: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """v (B, F, 32, 32) of the noisy half; past, noisy (B, F, 32, 32), t (B, F), classes (B,)."""
        both, t_both = torch.cat((past, noisy), 1), torch.cat((torch.zeros_like(t), t), 1)
        return network(both, t_both, classes, self.first, self.past)[:, t.shape[1] :]


@dataclass(frozen=True)
class Trajectories:
    """Of N batches: `past` (N, B, F, 32, 32), `classes` (N, B), `states` (N, steps + 1, B, F, 32, 32) of the ODEs."""

    past: torch.Tensor
    classes: torch.Tensor
    states: torch.Tensor


def worn(clean: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """The past as training sees it: frames a little noisy, or lost; but for the first, which a rollout is given.

    A rollout's past is made by the model and not quite right. Who has seen nothing but a perfect past drifts off.
    """
    level, lost = torch.rand(2, *clean.shape[:2], 1, 1, generator=generator)
    past = torch.lerp(clean, torch.randn(clean.shape, generator=generator), settings.past_noise * level)
    past = past.where(lost > settings.past_lost, -1.0)
    past[:, 0] = clean[:, 0]
    return past


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
        t = (torch.randn(shape, generator=generator) + 0.8).sigmoid()  # where the digit goes is decided at a large t
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, t[..., None, None])
        past = worn(clean, settings, generator)
        v = forcing[view_of(update)](network, past, noisy, t, classes)
        yield (v - (noise - clean)).square().mean()


def view_of(batch: int) -> str:
    return TURNS[batch % len(TURNS)]


@torch.no_grad()
def make_trajectories(
    teacher: VideoDiT, settings: Settings, draw: Callable, generator: torch.Generator
) -> Trajectories:
    """The teacher's ODE of every frame given the clean ones before it, kept where the student's steps begin and end."""
    forcing = {view: Forcing(settings, view) for view in TURNS}
    grid, every = times(settings.teacher_steps), settings.teacher_steps // settings.student_steps
    batches = []
    for batch in range(settings.batches_of_trajectories):
        clean, classes = draw(settings.clips, generator)
        past, x = worn(clean, settings, generator), torch.randn(clean.shape, generator=generator)
        states = [x]
        for step in range(1, len(grid)):
            t, after = grid[step - 1], grid[step]
            x = x - (t - after) * forcing[view_of(batch)](teacher, past, x, t.expand(x.shape[:2]), classes)
            if step % every == 0:
                states.append(x)
        batches.append((past, classes, torch.stack(states)))
    return Trajectories(*(torch.stack(part) for part in zip(*batches, strict=True)))


def student_losses(
    network: VideoDiT, settings: Settings, kept: Trajectories, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """From a kept state to the next in a step: v is the teacher's mean velocity between; each frame draws its step."""
    forcing = {view: Forcing(settings, view) for view in TURNS}
    grid = times(settings.student_steps)
    while True:
        for batch in torch.randperm(len(kept.past), generator=generator).tolist():
            past, classes, states = kept.past[batch], kept.classes[batch], kept.states[batch]
            step = torch.randint(settings.student_steps, past.shape[:2], generator=generator)
            clip, frame = torch.arange(step.shape[0])[:, None], torch.arange(step.shape[1])
            here, there = states[step, clip, frame], states[step + 1, clip, frame]
            t, after = grid[step], grid[step + 1]
            v = forcing[view_of(batch)](network, past, here, t, classes)
            yield (v - (here - there) / (t - after)[..., None, None]).square().mean()
