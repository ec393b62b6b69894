"""Classifier-free guidance (arXiv 2207.12598), by whichever rule a teacher's own sampler has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ard.models.trunk import Teacher


@dataclass(frozen=True)
class Guidance:
    """unconditional + scale * (conditional - unconditional) on the first ``channels`` channels, None for all; the
    conditional output on the others. scale 1 needs no unconditional forward.

    interval: the times, in the family's units, between which guidance applies, to rounding; None for always. DiT and
    SiT guide 3 of 4 latent channels, LightningDiT from a time on.
    null: conditions (1, ...) of the unconditional forward, a negative prompt's; None for the teacher's null conditions.
    """

    scale: float = 1.0
    channels: int | None = 3
    interval: tuple[float, float] | None = None
    null: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"cfg_scale: got {self.scale}; expected a finite number")
        if self.channels is not None and self.channels < 0:
            raise ValueError(f"cfg_channels: got {self.channels}; expected None or at least 0")

    def applies(self, time: float) -> bool:
        if self.scale == 1.0 or self.interval is None:
            return self.scale != 1.0
        rounding = 1e-9 * max(1.0, *map(abs, self.interval))  # a grid's 0.1 may be 0.09999999999999998
        return self.interval[0] - rounding <= time <= self.interval[1] + rounding


def guided(teacher: Teacher, x_Bchw: Tensor, time: float, conditions: Sequence[Tensor], guidance: Guidance) -> Tensor:
    """The teacher's prediction (B, c, h, w) in the dtype of x, without sigma channels.

    The teacher gets x in its own dtype; times are integers under "ddpm", else floating point.
    """
    B, channels, schedule = x_Bchw.shape[0], teacher.config.in_channels, teacher.config.CONVENTION.schedule
    x_model = x_Bchw.to(teacher.weight.dtype)
    applies = guidance.applies(time)
    if applies:
        x_model = torch.cat([x_model, x_model])
        null = teacher.null_conditions(*conditions) if guidance.null is None else _spread(guidance.null, conditions)
        conditions = [torch.cat(pair) for pair in zip(conditions, null, strict=True)]
    dtype = torch.int64 if schedule == "ddpm" else torch.promote_types(x_model.dtype, torch.float32)
    t = torch.full((len(x_model),), int(time) if schedule == "ddpm" else time, dtype=dtype, device=x_Bchw.device)
    output = teacher(x_model, t, *conditions)[:, :channels].to(x_Bchw.dtype)
    if not applies:
        return output
    conditional, unconditional = output[:B], output[B:]
    n = channels if guidance.channels is None else guidance.channels
    mixed = unconditional[:, :n] + guidance.scale * (conditional[:, :n] - unconditional[:, :n])
    return torch.cat([mixed, conditional[:, n:]], dim=1)


def _spread(null: Sequence[Tensor], conditions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One set of conditions for each sample, where those of the samples are."""
    return tuple(one.to(each.device, each.dtype).expand_as(each) for one, each in zip(null, conditions, strict=True))
