"""Teacher trajectories: what the student is distilled from (arXiv 2504.11295, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ard.diffusion import ddim_steps
from ard.model import DiT
from ard_kernels.common.arguments import described

STATE_KINDS = ("x0", "ode")


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories of B samples with S kept steps; segment s of the student reads states[:, s], predicts targets[:, s].

    noise: (B, c, h, w)
    x0: (B, S, c, h, w), the teacher's x0-prediction at each kept step
    ode: (B, S, c, h, w), the state that the DDIM step at each kept step arrives at
    labels: (B,) int64
    """

    noise: Tensor
    x0: Tensor
    ode: Tensor
    labels: Tensor

    def targets(self, kind: str = "x0") -> Tensor:
        """(B, S, c, h, w): what the student predicts; "x0" is the published code's kind, "ode" the paper's figure."""
        if kind not in STATE_KINDS:
            raise ValueError(f"kind: got {kind!r}; expected one of {STATE_KINDS}")
        return getattr(self, kind)

    def states(self, kind: str = "x0") -> Tensor:
        """(B, S, c, h, w): the student's inputs, the noise and then all targets but the last."""
        return torch.cat([self.noise[:, None], self.targets(kind)[:, :-1]], dim=1)


def check_keep(keep: tuple[int, ...], sampling_steps: int) -> None:
    """Raises ValueError unless ``keep`` are strictly descending respaced indices."""
    descending = all(earlier > later for earlier, later in pairwise(keep))
    if not keep or not descending or keep[0] >= sampling_steps or keep[-1] < 0:
        raise ValueError(
            f"keep: got {described(keep)}; expected strictly descending indices in [0, sampling_steps={sampling_steps})"
        )


def generate(
    teacher: DiT,
    noise: Tensor,
    labels: Tensor,
    *,
    sampling_steps: int = 25,
    keep: Sequence[int] = (15, 10, 5, 0),
    cfg_scale: float = 1.5,
    cfg_channels: int | None = 3,
) -> TrajectoryBatch:
    """Sample the teacher by DDIM from `noise` (B, c, h, w) with `labels` (B,) and keep the states at these indices.

    keep: respaced indices, strictly descending in [0, sampling_steps); steps after the last one are not run.
    cfg_scale, cfg_channels: see `ard.diffusion.guided_epsilon`.
    """
    keep = tuple(keep)
    check_keep(keep, sampling_steps)
    kept = []
    for step in ddim_steps(
        teacher, noise, labels, sampling_steps=sampling_steps, cfg_scale=cfg_scale, cfg_channels=cfg_channels
    ):
        if step.index in keep:
            kept.append(step)
        if step.index == keep[-1]:
            break
    return TrajectoryBatch(
        noise=noise,
        x0=torch.stack([step.x0 for step in kept], dim=1),
        ode=torch.stack([step.arrival for step in kept], dim=1),
        labels=labels,
    )
