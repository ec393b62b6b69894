"""Endless rollouts through a rolling cache, and what they are judged by."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from model import DEPTH, HEAD_DIM, HEADS, L, Past, VideoDiT, times
from moving import SIDE, STEP, Reader

from ard_kernels import HistoryCache


@dataclass(frozen=True)
class Rollout:
    """video (streams, frames, 32, 32) in [-1, 1]; bytes of the cache after each frame; seconds of it all."""

    video: torch.Tensor
    cache_bytes: list[int]
    seconds: float


@torch.no_grad()
def roll(
    network: VideoDiT,
    start: torch.Tensor,
    classes: torch.Tensor,
    *,
    steps: int,
    frames: int,
    window: int,
    sink: int,
    longest: int,
    generator: torch.Generator,
) -> Rollout:
    """Frame by frame: `steps` noisy calls that keep nothing, then a clean one at t = 0 that the cache keeps.

    start: (streams, 32, 32), the first frames, which are given (image to video); classes: (streams,) of what they show,
    heard by them alone. longest: the longest distance to the sink seen in training, in
    frames; from then on the sink stays at this distance.
    """
    streams, began = len(classes), time.perf_counter()
    cache = HistoryCache.rolling(DEPTH, streams, HEADS, HEAD_DIM, segment_length=L, window=window, sink=sink)
    grid = times(steps)
    video, cache_bytes = [], []
    for frame in range(frames):
        place = torch.tensor([frame])
        place_for_sink = place.clamp(max=longest) if sink else None

        def velocity(x: torch.Tensor, t: torch.Tensor, commit: bool, frame=frame, where=(place, place_for_sink)):
            past = Past(where[0], cache=cache, commit=commit, frame_for_sink=where[1])
            return network(x, t.expand(streams, 1), classes, [frame == 0], past)

        x = start[:, None]
        if frame > 0:
            x = torch.randn(streams, 1, SIDE, SIDE, generator=generator)
            for t, after in pairwise(grid):
                x = x - (t - after) * velocity(x, t, commit=False)
            x = x.clamp(-1, 1)
        velocity(x, grid[-1], commit=True)
        video.append(x)
        cache_bytes.append(cache.nbytes)
    return Rollout(torch.cat(video, 1), cache_bytes, time.perf_counter() - began)


def spans(frames: int) -> dict[str, slice]:
    """The first, middle and last tenth of a rollout without its given frame, by the names that the report prints."""
    tenth = max(2, frames // 10)
    middle = (frames - tenth) // 2
    parts = [slice(1, tenth), slice(middle, middle + tenth), slice(frames - tenth, frames)]
    return {f"frames {part.start + 1}-{part.stop}": part for part in parts}


def judge(video: torch.Tensor, classes: torch.Tensor, reader: Reader) -> dict:
    """Of streams that began with a digit of `classes` (streams,), per span: the share of frames that show this digit,
    their mean squared error to the nearest real scan, and the share of moves as digits move: by STEP in both axes.
    """
    streams, frames = video.shape[:2]
    read, corner, error = reader(video.flatten(0, 1))
    right = (read.view(streams, frames) == classes[:, None]).float()
    corner, error = corner.view(streams, frames, 2), error.view(streams, frames)
    moves = torch.ones(streams, frames)  # into each frame; the first is given
    moves[:, 1:] = corner.diff(dim=1).abs().eq(STEP).all(-1).float()
    return {
        name: {
            "right": right[:, part].mean().item(),
            "error": error[:, part].mean().item(),
            "moves": moves[:, part].mean().item(),
        }
        for name, part in spans(frames).items()
    }
