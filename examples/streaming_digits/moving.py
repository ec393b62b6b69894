"""Moving digits: real 8x8 scans that hop over a 32x32 canvas and bounce off its walls, made by a seeded stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ard.data import digits

SIDE, SCAN = 32, 8
REACH = SIDE - SCAN  # a scan's corner is at 0, STEP, .. REACH in each axis
STEP = SCAN  # pixels of a hop: a whole patch. Hops of half a patch were not learned in the time (tried)
SPEEDS = STEP * torch.tensor([-1, 1])  # pixels a frame, drawn per axis
CLASSES = digits.NUM_CLASSES


def clips(
    scans: torch.Tensor, labels: torch.Tensor, frames: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` clips (count, frames, 32, 32) in [-1, 1], one digit each, and their classes (count,).

    scans: (n, 1, 8, 8) in [-1, 1]; labels: (n,). Places, speeds and scans are drawn from `generator`.
    """
    chosen = torch.randint(len(labels), (count,), generator=generator)
    start = STEP * torch.randint(2 * REACH // STEP, (count, 1, 2), generator=generator)
    speed = SPEEDS[torch.randint(len(SPEEDS), (count, 1, 2), generator=generator)]
    way = (start + speed * torch.arange(frames)[:, None]) % (2 * REACH)
    corner = torch.minimum(way, 2 * REACH - way)  # there and back again: (count, frames, 2)
    rows, columns = (corner[..., axis, None] + torch.arange(SCAN) for axis in (0, 1))  # (count, frames, 8)
    video = torch.full((count, frames, SIDE, SIDE), -1.0)
    clip, frame = torch.arange(count)[:, None, None, None], torch.arange(frames)[:, None, None]
    video[clip, frame, rows[..., :, None], columns[..., None, :]] = scans[chosen]
    return video, labels[chosen]


class Reader:
    """Reads a frame: the class and the place of the nearest real scan, over all scans and places.

    scans: (n, 1, 8, 8) in [-1, 1]; labels: (n,).
    """

    def __init__(self, scans: torch.Tensor, labels: torch.Tensor):
        self.ink, self.labels = (scans + 1) / 2, labels
        self.energy = self.ink.square().sum((1, 2, 3))

    def __call__(self, frames: torch.Tensor, chunk: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """frames (n, 32, 32) -> classes (n,), corners (n, 2), mean squared errors of ink (n,) to the nearest scan."""
        classes, corners, errors = [], [], []
        for part in frames.split(chunk):
            ink = (part[:, None] + 1) / 2
            # |frame - scan at place|^2 = |frame|^2 + |scan|^2 - 2 frame . scan
            distance = self.energy[:, None, None] - 2 * F.conv2d(
                ink, self.ink, stride=STEP
            )  # (chunk, scans, places, places)
            nearest, at = distance.flatten(1).min(1)
            places = REACH // STEP + 1
            classes.append(self.labels[at // places**2])
            corners.append(STEP * torch.stack((at // places % places, at % places), -1))
            errors.append((ink.square().sum((1, 2, 3)) + nearest) / SIDE**2)
        return torch.cat(classes), torch.cat(corners), torch.cat(errors)
