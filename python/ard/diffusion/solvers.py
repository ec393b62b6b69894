"""ODE solvers from noise to data, a step at a time, on a teacher's predictions.

DDIM with eta = 0 (arXiv 2010.02502), from timestep t to the next kept timestep u (a_u = 1 after the last):

    x0 = (x - sqrt(1 - a_t) eps) / sqrt(a_t)          x_u = sqrt(a_u) x0 + sqrt(1 - a_u) eps

On the linear path, in its position p from 0 (noise) to 1 (data), dx/dp = v; a step of length d is

    euler      x + d v(x, p)
    heun       x + d/2 (v(x, p) + v(x + d v(x, p), p + d))
    midpoint   x + d v(x + d/2 v(x, p), p + d/2)

and the prediction of the data at its start, of any solver, is x0 = x + (1 - p) v(x, p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ard.diffusion.guidance import Guidance, guided
from ard.models.convention import Convention, alphas_cumprod
from ard.models.trunk import Teacher


@dataclass(frozen=True)
class Step:
    """One step: its index, counted down to 0, the last; the x0-prediction at its start and the state it arrives at,
    both (B, c, h, w); and the time of that state."""

    index: int
    x0: Tensor
    arrival: Tensor
    time: float


def solver_of(convention: Convention, solver: str | None) -> str:
    """The solver of this name; the schedule's usual one for None. Raises ValueError for one that does not suit it."""
    if solver is not None and solver not in convention.solvers:
        raise ValueError(
            f"solver: got {solver!r}; expected one of {convention.solvers} for the schedule {convention.schedule!r}"
        )
    return solver or convention.solvers[0]


@torch.no_grad()
def solve(
    teacher: Teacher,
    noise_Bchw: Tensor,
    conditions: Sequence[Tensor],
    *,
    sampling_steps: int,
    solver: str | None = None,
    shift: float = 0.0,
    guidance: Guidance | None = None,
) -> Iterator[Step]:
    """Walk from the noise to the data in ``sampling_steps`` steps, from index sampling_steps - 1 down to 0.

    States are kept in at least float32; no clipping. The arrival at index 0 is the sample.
    shift: of the grid of times, see `Convention.grid`.
    """
    convention = teacher.config.CONVENTION
    solver, guidance = solver_of(convention, solver), guidance or Guidance()
    grid = convention.grid(sampling_steps, shift)
    x = noise_Bchw.to(torch.promote_types(noise_Bchw.dtype, torch.float32))

    def predict(x_Bchw: Tensor, time: float) -> Tensor:
        return guided(teacher, x_Bchw, time, conditions, guidance)

    steps = _ddim(convention, predict, x, grid) if solver == "ddim" else _flow(convention, predict, x, grid, solver)
    for number, (x0, x, time) in enumerate(steps, start=1):
        yield Step(sampling_steps - number, x0, x, time)


Predict = Callable[[Tensor, float], Tensor]
Steps = Iterator[tuple[Tensor, Tensor, float]]  # x0, the next state, its time


def _ddim(convention: Convention, predict: Predict, x: Tensor, grid: Sequence[float]) -> Steps:
    a = alphas_cumprod().tolist()
    for number, (here, there) in enumerate(pairwise(grid), start=2):
        a_here, a_next = a[int(here)], 1.0 if number == len(grid) else a[int(there)]
        signal, noise, output = math.sqrt(a_here), math.sqrt(1.0 - a_here), predict(x, here)
        if convention.prediction == "epsilon":
            epsilon = output
            x0 = (x - noise * epsilon) / signal
        elif convention.prediction == "velocity":
            x0, epsilon = signal * x - noise * output, signal * output + noise * x
        else:
            x0, epsilon = output, (x - signal * output) / noise
        x = math.sqrt(a_next) * x0 + math.sqrt(1.0 - a_next) * epsilon
        yield x0, x, there


def _flow(convention: Convention, predict: Predict, x: Tensor, grid: Sequence[float], solver: str) -> Steps:
    def velocity(x_Bchw: Tensor, time: float) -> Tensor:
        output = predict(x_Bchw, time)
        if convention.prediction == "x0":
            return (output - x_Bchw) / (1.0 - convention.position(time))
        return -output if convention.velocity_to_noise else output

    if convention.prediction == "x0" and solver == "heun":
        raise ValueError("solver: got 'heun'; expected 'euler' or 'midpoint': x0 gives no velocity where it ends")
    for here, there in pairwise(grid):
        p = convention.position(here)
        d, v = convention.position(there) - p, velocity(x, here)
        x0 = x + (1.0 - p) * v
        if solver == "euler":
            x = x + d * v
        elif solver == "heun":
            x = x + d / 2 * (v + velocity(x + d * v, there))
        else:
            x = x + d * velocity(x + d / 2 * v, (here + there) / 2)
        yield x0, x, there
