"""Teacher trajectories: what the student is distilled from (arXiv 2504.11295, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ard.config.choices import STATE_KINDS, check_keep
from ard.diffusion.guidance import Guidance
from ard.diffusion.solvers import solve
from ard.models.trunk import Teacher

Interval = float | Sequence[float] | None


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories of B samples with S kept steps; segment s of the student reads states[:, s], predicts targets[:, s].

    noise: (B, c, h, w)
    x0: (B, S, c, h, w), the teacher's x0-prediction at each kept step
    ode: (B, S, c, h, w), the state that the solver's step at each kept index arrives at
    conditions: (B, ...) each, as the teacher's config names them
    """

    noise: Tensor
    x0: Tensor
    ode: Tensor
    conditions: tuple[Tensor, ...]

    def targets(self, kind: str = "x0") -> Tensor:
        """(B, S, c, h, w): what the student predicts; "x0" is the published code's kind, "ode" the paper's figure."""
        if kind not in STATE_KINDS:
            raise ValueError(f"kind: got {kind!r}; expected one of {STATE_KINDS}")
        return getattr(self, kind)

    def states(self, kind: str = "x0") -> Tensor:
        """(B, S, c, h, w): the student's inputs, the noise and then all targets but the last."""
        return torch.cat([self.noise[:, None], self.targets(kind)[:, :-1]], dim=1)


def generate(
    teacher: Teacher,
    noise: Tensor,
    *conditions: Tensor,
    sampling_steps: int = 25,
    keep: Sequence[int] = (15, 10, 5, 0),
    solver: str | None = None,
    shift: float = 0.0,
    cfg_scale: float = 1.5,
    cfg_channels: int | None = 3,
    cfg_interval: Interval = None,
    null: tuple[Tensor, ...] | None = None,
) -> TrajectoryBatch:
    """Solve the teacher's ODE from `noise` (B, c, h, w) under `conditions` and keep the states at these indices.

    conditions: as the teacher's config names them: labels (B,) int64 for the class-conditional families.
    sampling_steps, keep: steps are counted down to index 0, the last; indices strictly descending. Steps after the last
        kept one are not run.
    solver, shift: see `ard.diffusion.solvers`; the schedule's usual solver by default, "ddim" for DiT.
    cfg_scale, cfg_channels, cfg_interval, null: see `ard.diffusion.guidance`; a number is an interval from there to the
        data.
    """
    keep = tuple(keep)
    check_keep(keep, sampling_steps)
    guidance = Guidance(cfg_scale, cfg_channels, _interval(teacher, cfg_interval), null)
    kept = []
    for step in solve(
        teacher, noise, conditions, sampling_steps=sampling_steps, solver=solver, shift=shift, guidance=guidance
    ):
        if step.index in keep:
            kept.append(step)
        if step.index == keep[-1]:
            break
    return TrajectoryBatch(
        noise=noise,
        x0=torch.stack([step.x0 for step in kept], dim=1),
        ode=torch.stack([step.arrival for step in kept], dim=1),
        conditions=conditions,
    )


def trajectory(
    teacher: Teacher,
    noise: Tensor,
    *conditions: Tensor,
    solver: str = "euler",
    times: int = 26,
    shift: float = 0.0,
    cfg_scale: float = 1.0,
    cfg_channels: int | None = 3,
    cfg_interval: Interval = None,
    null: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """All states of the teacher's ODE on a grid of ``times`` times, the noise first: (B, times, c, h, w).

    conditions: as the teacher's config names them: labels (B,) int64 for the class-conditional families.
    solver: "euler", "heun" or "midpoint" on the linear path (SiT, LightningDiT), "ddim" for DiT.
    shift: s moves each position p of the even grid to s p / (1 + (s - 1) p); 0 moves nothing.
    cfg_scale, cfg_channels: guidance of the first channels, None for all. cfg_interval: (first, last) time of guidance,
        or its first time alone. null: conditions (1, ...) of a negative prompt. The result is at least float32.
    """
    if times < 2:
        raise ValueError(f"times: got {times}; expected at least 2, the noise's and the data's")
    guidance = Guidance(cfg_scale, cfg_channels, _interval(teacher, cfg_interval), null)
    steps = solve(teacher, noise, conditions, sampling_steps=times - 1, solver=solver, shift=shift, guidance=guidance)
    states = [step.arrival for step in steps]
    return torch.stack([noise.to(states[0].dtype), *states], dim=1)


def _interval(teacher: Teacher, interval: Interval) -> tuple[float, float] | None:
    if interval is None:
        return None
    convention = teacher.config.CONVENTION
    ends = (interval, convention.data_time) if isinstance(interval, (int, float)) else interval
    return convention.check_interval([float(time) for time in ends])
