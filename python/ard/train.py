"""Single-process training: the teacher on images, the student on trajectories. ``fit`` is the loop of both.

All randomness of step ``i`` (which samples, noise, timesteps, dropped labels) is a pure function of (seed, i), so two
runs with one seed see the same data in the same order, whatever else they differ in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ard.diffusion import TRAIN_STEPS, alphas_cumprod
from ard.ema import Ema
from ard.files import write_json, write_tensors
from ard.losses import trajectory_loss
from ard.model import DiT
from ard.store import TrajectoryStore, batch_indices, random_stream
from ard.student import ARDStudent


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of ``fit``; the defaults are the paper's student's."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # learning rate rises linearly from 0
    cosine_decay: bool = False  # then falls to 0 along a half cosine, or stays
    ema_decay: float = 0.9999
    grad_clip: float = 1.0  # 2-norm over all parameters
    seed: int = 0
    log_every: int = 25  # steps per line of the log; each line holds the mean loss since the line before

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name}={getattr(self, name)}; expected >= 1")

    def learning_rate_at(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1.0 + math.cos(math.pi * step / self.steps)) if self.cosine_decay else 1.0
        return self.learning_rate * warmup * decay


class NonFiniteError(RuntimeError):
    """A loss or gradient norm was not finite; the weights are those before the step."""


@dataclass
class Fitted:
    """What ``fit`` returns: the averaged weights and the logged curve."""

    ema: Ema
    log: list[dict[str, float]]  # step (1-based, number of updates done), loss, grad_norm, learning_rate


# step -> (loss scalar, indices of the samples in the batch)
StepLoss = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    config: TrainConfig,
    *,
    log_path: Path | None = None,
    on_step: Callable[[], Any] | None = None,
) -> Fitted:
    """Trains ``model`` in place.

    log_path: JSONL, one line every ``config.log_every`` steps. on_step: called after each update.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    ema, log, losses = Ema(model, config.ema_decay), [], []
    model.train()
    with open(log_path, "w") if log_path else nullcontext() as log_file:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            loss, indices = step_loss(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            require_finite(step, loss.item(), grad_norm.item(), indices)
            optimizer.step()
            ema.update(model, step)
            losses.append(loss.item())
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                line = {
                    "step": step + 1,
                    "loss": float(np.mean(losses)),
                    "grad_norm": grad_norm.item(),
                    "learning_rate": config.learning_rate_at(step),
                }
                log.append(line)
                losses.clear()
                if log_file:
                    log_file.write(json.dumps(line) + "\n")
                    log_file.flush()
            if on_step:
                on_step()
    return Fitted(ema, log)


def require_finite(step: int, loss: float, grad_norm: float, indices: torch.Tensor) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"step {step}: loss={loss}, gradient norm={grad_norm}; expected finite values. "
            f"No update was made. Samples of the batch: {indices.tolist()}"
        )


def teacher_step_loss(
    teacher: DiT, images: torch.Tensor, labels: torch.Tensor, config: TrainConfig, label_dropout: float
) -> StepLoss:
    """The DDPM loss: MSE of the predicted epsilon at a uniform timestep (Ho et al. 2020, eq. 14).

    images: float32 (n, ch, h, w) in [-1, 1]; labels: int64 (n,). label_dropout: share of labels replaced by the null
    label, which is what classifier-free guidance needs. Sigma channels, if the teacher has them, are not trained.
    """
    signal = alphas_cumprod().sqrt().float()
    noise_level = (1.0 - alphas_cumprod()).sqrt().float()
    channels, null_label = images.shape[1], teacher.config.num_classes

    def step_loss(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = batch_indices(config.seed, step, config.batch_size, len(labels))
        draw = random_stream(config.seed, "teacher", step)
        t = torch.from_numpy(draw.integers(TRAIN_STEPS, size=len(indices)))
        dropped = torch.from_numpy(draw.random(len(indices)) < label_dropout)
        x0 = images[indices]
        epsilon = torch.from_numpy(draw.standard_normal(tuple(x0.shape), dtype=np.float32))
        x_t = signal[t].view(-1, 1, 1, 1) * x0 + noise_level[t].view(-1, 1, 1, 1) * epsilon
        y = labels[indices].masked_fill(dropped, null_label)
        return F.mse_loss(teacher(x_t, t, y)[:, :channels], epsilon), indices

    return step_loss


def student_step_loss(student: ARDStudent, store: TrajectoryStore, config: TrainConfig, state: str) -> StepLoss:
    """Teacher-forced regression of every next state (design: one forward over all tokens). state: "x0" or "ode"."""

    def step_loss(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = batch_indices(config.seed, step, config.batch_size, len(store))
        states, targets, labels = store.pairs(indices, state)
        return trajectory_loss(student(states, labels), targets), indices

    return step_loss


def save_checkpoint(folder: Path, model: nn.Module, fitted: Fitted, config: TrainConfig, facts: dict) -> dict[str, str]:
    """Writes model.safetensors, ema.safetensors, then checkpoint.json with their sha256, the config and ``facts``.

    Returns file name -> sha256.

    The JSON comes last, and every file is atomic: a folder with a checkpoint.json is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "model.safetensors": write_tensors(folder / "model.safetensors", model.state_dict()),
        "ema.safetensors": write_tensors(folder / "ema.safetensors", fitted.ema.state),
    }
    write_json(folder / "checkpoint.json", {"sha256": files, "train": asdict(config), "step": config.steps, **facts})
    return files
