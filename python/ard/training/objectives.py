"""What training minimises: the teacher's denoising loss on images, the student's regression on trajectories.

All randomness of step ``i`` (which samples, noise, timesteps, dropped labels) is a pure function of (seed, i), so two
runs with one seed see the same data in the same order, however many processes and micro-batches share a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ard.common.streams import batch_indices, random_stream
from ard.data.trajectories import Trajectories
from ard.models.convention import TRAIN_STEPS, Convention, alphas_cumprod
from ard.training.losses import sample_mse

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class MicroBatch:
    """Rows ``rows`` of the batch of one step."""

    step: int
    batch: Tensor  # sample indices of the whole batch, int64 (batch_size,)
    rows: slice

    @property
    def indices(self) -> Tensor:
        """Sample indices of this micro-batch."""
        return self.batch[self.rows]


class Objective:
    """A loss per sample. Subclasses give `sample_losses`; those with a second model override the rest too."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Sample indices of a step, in global order."""
        return batch_indices(self.seed, step, batch_size, self.count)

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """Loss of each sample, (n,), at least float32."""
        raise NotImplementedError

    def backward(self, model: nn.Module, micro: MicroBatch, share: float, autocast: Autocast) -> dict[str, Tensor]:
        """Adds the gradient of ``share`` times the mean loss; returns scalars for the log, "loss" among them."""
        with autocast():
            loss = self.sample_losses(model, micro).mean()
        (loss * share).backward()
        return {"loss": loss.detach()}

    def reduce(self) -> dict[str, float]:
        """Averages the gradients of what the objective itself trains over all ranks; returns scalars for the log."""
        return {}

    def update(self) -> None:
        """After the model's update: updates what the objective itself trains."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold of the objective: groups of whole tensors."""
        return {}

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; ``read`` gives a group."""


class TeacherObjective(Objective):
    """The denoising loss of a family: MSE of the prediction at a uniform time.

    DDPM (Ho et al. 2020, eq. 14): a uniform timestep, the noise as target. Linear path (Lipman et al. 2023): a uniform
    position p, and the velocity. images: float32 (n, ch, h, w) in [-1, 1]; conditions: (n, ...) each.
    label_dropout: share of samples whose conditions are replaced by the null ones, which is what classifier-free
    guidance needs. Sigma channels, if the teacher has them, are not trained.
    """

    def __init__(
        self,
        images: Tensor,
        *conditions: Tensor,
        convention: Convention,
        null: Callable[..., tuple[Tensor, ...]],
        label_dropout: float,
        seed: int,
        device: torch.device | None = None,
    ):
        super().__init__(len(images), seed)
        self.images, self.conditions, self.convention, self.null = images, conditions, convention, null
        self.label_dropout, self.device = label_dropout, device or torch.device("cpu")
        self.signal = alphas_cumprod().sqrt().float()
        self.noise_level = (1.0 - alphas_cumprod()).sqrt().float()

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        data, draw = self.images[micro.batch], random_stream(self.seed, "teacher", micro.step)
        ddpm = self.convention.schedule == "ddpm"
        drawn = draw.integers(TRAIN_STEPS, size=len(data)) if ddpm else draw.random(len(data), dtype=np.float32)
        dropped = torch.from_numpy(draw.random(len(data)) < self.label_dropout)
        noise = torch.from_numpy(draw.standard_normal(tuple(data.shape), dtype=np.float32))
        t, x_t, target = self._interpolated(torch.from_numpy(drawn), data, noise)
        given = [condition[micro.batch] for condition in self.conditions]
        conditions = [
            torch.where(dropped.view(-1, *[1] * (kept.ndim - 1)), null, kept)
            for kept, null in zip(given, self.null(*given), strict=True)
        ]
        rows = (tensor[micro.rows].to(self.device) for tensor in (target, x_t, t, *conditions))
        target, *inputs = rows
        return sample_mse(model(*inputs)[:, : data.shape[1]], target)

    def _interpolated(self, drawn: Tensor, data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Times, states and targets, of timesteps (DDPM) or positions p."""
        convention = self.convention
        if convention.schedule == "ddpm":
            signal, level = (table[drawn].view(-1, 1, 1, 1) for table in (self.signal, self.noise_level))
            targets = {"epsilon": noise, "x0": data, "velocity": signal * noise - level * data}
            return drawn, signal * data + level * noise, targets[convention.prediction]
        p = drawn.view(-1, 1, 1, 1)
        velocity = noise - data if convention.velocity_to_noise else data - noise
        times = convention.noise_time + drawn * (convention.data_time - convention.noise_time)
        return times, p * data + (1.0 - p) * noise, data if convention.prediction == "x0" else velocity


class StudentObjective(Objective):
    """Teacher-forced regression of every next state: one forward over all tokens. state: "x0" or "ode"."""

    def __init__(self, trajectories: Trajectories, *, state: str, seed: int, device: torch.device | None = None):
        super().__init__(len(trajectories), seed)
        self.trajectories, self.state, self.device = trajectories, state, device or torch.device("cpu")

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(states, targets, conditions) on the device, states in float32."""
        states, targets, conditions = self.trajectories.pairs(indices, self.state)
        states, targets = (self._moved(tensor).float() for tensor in (states, targets))
        return states, targets, tuple(map(self._moved, conditions))

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        states, targets, conditions = self.rows(micro.indices)
        return sample_mse(model(states, *conditions), targets)
