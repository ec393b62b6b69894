"""What the output of a family's models means: prediction, schedule, and the direction of time.

Two schedules. "ddpm" is that of arXiv 2006.11239, linear betas over 1000 integer timesteps, time running down
to the data:

    x_t = sqrt(a_t) data + sqrt(1 - a_t) noise          a_t the product of 1 - beta up to t

"linear" is the straight path of flow matching (arXiv 2209.03003), in whatever time the family counts. With p, the
path's position, running from 0 (noise) to 1 (data),

    x = p data + (1 - p) noise          dx/dp = data - noise          t = noise_time + p (data_time - noise_time)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
PREDICTIONS = ("epsilon", "velocity", "x0")
SCHEDULES = ("ddpm", "linear")


@dataclass(frozen=True)
class Convention:
    """Of one family. Times are what its models are given.

    prediction: "epsilon" (the noise), "x0" (the data), or "velocity": on the linear path dx/dp = data - noise, or
    noise - data where `velocity_to_noise`; under "ddpm" sqrt(a) noise - sqrt(1 - a) data (arXiv 2202.00512).
    """

    prediction: str
    schedule: str
    noise_time: float
    data_time: float
    velocity_to_noise: bool = False

    def __post_init__(self) -> None:
        for name, known in (("prediction", PREDICTIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"Convention: {name} is {getattr(self, name)!r}; expected one of {known}")
        if self.schedule == "linear" and self.prediction == "epsilon":
            raise ValueError("Convention: epsilon on the linear path says nothing of the data at its start")

    @property
    def solvers(self) -> tuple[str, ...]:
        """The solvers that suit the schedule, the usual one first."""
        return ("ddim",) if self.schedule == "ddpm" else ("euler", "heun", "midpoint")

    def position(self, time: float) -> float:
        """p of a time on the linear path."""
        return (time - self.noise_time) / (self.data_time - self.noise_time)

    def grid(self, steps: int, shift: float = 0.0) -> tuple[float, ...]:
        """The times of ``steps`` solver steps, noise first: steps + 1 of them.

        ddpm: the respaced timesteps, descending, and ``data_time`` after the last. linear: even positions, shifted by
        p' = shift * p / (1 + (shift - 1) * p) unless shift is 0.
        """
        if self.schedule == "ddpm":
            if shift:
                raise ValueError(f"shift: got {shift}; expected 0 for the timesteps of DDPM")
            return (*map(float, reversed(respaced_timesteps(steps))), self.data_time)
        if steps < 1 or not 0.0 <= shift < math.inf:
            raise ValueError(f"grid: got steps={steps}, shift={shift}; expected at least 1 and a number >= 0")
        even = [i / steps for i in range(steps + 1)]
        positions = [shift * p / (1.0 + (shift - 1.0) * p) for p in even] if shift else even
        inner = [self.noise_time + p * (self.data_time - self.noise_time) for p in positions[1:-1]]
        return (self.noise_time, *inner, self.data_time)

    def check_interval(self, interval: Sequence[float], where: str = "cfg_interval") -> tuple[float, float]:
        """Its earlier and later time, in order of size. Raises ValueError unless both are times of the path."""
        least, most = sorted((self.noise_time, self.data_time))
        if len(interval) != 2 or not all(least <= time <= most for time in interval):  # NaN is none
            raise ValueError(
                f"{where}: got {list(interval)}; expected two times within [{least:g}, {most:g}], the family's"
            )
        return min(interval), max(interval)

    def kept_times(self, steps: int, keep: Sequence[int], shift: float = 0.0) -> tuple[float, ...]:
        """Times at which the trajectory stands after its steps of these indices; index 0 is the last step."""
        grid = self.grid(steps, shift)
        return tuple(grid[steps - index] for index in keep)

    def even_times(self, segments: int, steps: int, device: torch.device | None = None) -> Tensor:
        """(segments,) float32: the first of ``steps`` times evenly from noise to data. DiT: 999 * (1 - s / S)."""
        s = torch.arange(segments, dtype=torch.float32, device=device)
        return self.noise_time * (1.0 - s / steps) + self.data_time * (s / steps)


def alphas_cumprod() -> Tensor:
    """a_t of the 1000 training timesteps, float64 on the CPU."""
    betas = torch.linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1.0 - betas, dim=0)


def respaced_timesteps(sampling_steps: int) -> tuple[int, ...]:
    """The kept original timesteps, ascending: strides of 999 / (n - 1) from 0, rounded half to even.

    25 steps give (0, 42, 83, 125, 166, ..., 957, 999), as in the improved-diffusion and DiT samplers.
    """
    if not 2 <= sampling_steps <= TRAIN_STEPS:  # a single one would be timestep 0: noise that is read as data
        raise ValueError(f"sampling_steps: got {sampling_steps}; expected 2 to {TRAIN_STEPS}")
    stride = (TRAIN_STEPS - 1) / (sampling_steps - 1)
    position, timesteps = 0.0, []
    for _ in range(sampling_steps):
        timesteps.append(round(position))
        position += stride  # accumulated, not multiplied, so that ties round as in the published samplers
    return tuple(timesteps)
