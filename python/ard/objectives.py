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

from ard.diffusion import TRAIN_STEPS, alphas_cumprod
from ard.losses import sample_mse
from ard.store import TrajectoryStore
from ard.streams import batch_indices, random_stream

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
    """The DDPM loss: MSE of the predicted epsilon at a uniform timestep (Ho et al. 2020, eq. 14).

    images: float32 (n, ch, h, w) in [-1, 1]; labels: int64 (n,). label_dropout: share of labels replaced by the null
    label, which is what classifier-free guidance needs. Sigma channels, if the teacher has them, are not trained.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        null_label: int,
        label_dropout: float,
        seed: int,
        device: torch.device | None = None,
    ):
        super().__init__(len(labels), seed)
        self.images, self.labels, self.null_label, self.label_dropout = images, labels, null_label, label_dropout
        self.signal = alphas_cumprod().sqrt().float()
        self.noise_level = (1.0 - alphas_cumprod()).sqrt().float()
        self.device = device or torch.device("cpu")

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        x0, draw = self.images[micro.batch], random_stream(self.seed, "teacher", micro.step)
        t = torch.from_numpy(draw.integers(TRAIN_STEPS, size=len(x0)))
        dropped = torch.from_numpy(draw.random(len(x0)) < self.label_dropout)
        epsilon = torch.from_numpy(draw.standard_normal(tuple(x0.shape), dtype=np.float32))
        x_t = self.signal[t].view(-1, 1, 1, 1) * x0 + self.noise_level[t].view(-1, 1, 1, 1) * epsilon
        y = self.labels[micro.batch].masked_fill(dropped, self.null_label)
        x_t, t, y, epsilon = (tensor[micro.rows].to(self.device) for tensor in (x_t, t, y, epsilon))
        return sample_mse(model(x_t, t, y)[:, : x0.shape[1]], epsilon)


class StudentObjective(Objective):
    """Teacher-forced regression of every next state: one forward over all tokens. state: "x0" or "ode"."""

    def __init__(self, store: TrajectoryStore, *, state: str, seed: int, device: torch.device | None = None):
        super().__init__(len(store), seed)
        self.store, self.state, self.device = store, state, device or torch.device("cpu")

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(states, targets, labels) on the device, float32."""
        states, targets, labels = self.store.pairs(indices, self.state)
        if self.device.type == "cuda":
            states, targets, labels = (tensor.pin_memory() for tensor in (states, targets, labels))
        states, targets = (x.to(self.device, non_blocking=True).float() for x in (states, targets))
        return states, targets, labels.to(self.device, non_blocking=True)

    def sample_losses(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        states, targets, labels = self.rows(micro.indices)
        return sample_mse(model(states, labels), targets)
