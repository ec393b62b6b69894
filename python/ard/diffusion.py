"""The teacher's diffusion: DDPM linear betas, respaced deterministic DDIM, classifier-free guidance.

Forward process (arXiv 2006.11239): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, with a_t the product of 1 - beta up to t.
DDIM with eta = 0 (arXiv 2010.02502), from timestep t to the next kept timestep u (a_u = 1 after the last):

    x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)          x_u = sqrt(a_u) x0_hat + sqrt(1 - a_u) eps
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ard.model import DiT

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02


def alphas_cumprod() -> Tensor:
    """a_t of the 1000 training timesteps, float64 on the CPU."""
    betas = torch.linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS, dtype=torch.float64, device="cpu")
    return torch.cumprod(1.0 - betas, dim=0)


def respaced_timesteps(sampling_steps: int) -> tuple[int, ...]:
    """The kept original timesteps, ascending: strides of 999 / (n - 1) from 0, rounded half to even.

    25 steps give (0, 42, 83, 125, 166, ..., 957, 999), as in the improved-diffusion and DiT samplers.
    """
    if not 1 <= sampling_steps <= TRAIN_STEPS:
        raise ValueError(f"sampling_steps: got {sampling_steps}; expected 1 to {TRAIN_STEPS}")
    stride = (TRAIN_STEPS - 1) / (sampling_steps - 1) if sampling_steps > 1 else 1.0
    position, timesteps = 0.0, []
    for _ in range(sampling_steps):
        timesteps.append(round(position))
        position += stride  # accumulated, not multiplied, so that ties round as in the published samplers
    return tuple(timesteps)


@dataclass(frozen=True)
class DDIMStep:
    """One step at a respaced index: the x0-prediction there and the state it arrives at, both (B, c, h, w)."""

    index: int
    x0: Tensor
    arrival: Tensor


def guided_epsilon(
    teacher: DiT, x_Bchw: Tensor, timestep: int, labels_B: Tensor, *, cfg_scale: float, cfg_channels: int | None
) -> Tensor:
    """Epsilon (B, c, h, w) in the dtype of x: uncond + cfg_scale * (cond - uncond) on the first `cfg_channels`
    channels, the conditional prediction on the others; None guides all. cfg_scale 1 needs no unconditional forward.
    """
    B, channels = x_Bchw.shape[0], teacher.config.in_channels
    x_model = x_Bchw.to(teacher.pos_embed.dtype)
    guided = cfg_scale != 1.0
    if guided:
        x_model = torch.cat([x_model, x_model])
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, teacher.config.num_classes)])
    t = torch.full(labels_B.shape, timestep, dtype=torch.int64, device=x_Bchw.device)
    epsilon = teacher(x_model, t, labels_B)[:, :channels].to(x_Bchw.dtype)
    if not guided:
        return epsilon
    conditional, unconditional = epsilon.split(B)
    n = channels if cfg_channels is None else cfg_channels
    mixed = unconditional[:, :n] + cfg_scale * (conditional[:, :n] - unconditional[:, :n])
    return torch.cat([mixed, conditional[:, n:]], dim=1)


@torch.no_grad()
def ddim_steps(
    teacher: DiT,
    noise_Bchw: Tensor,
    labels_B: Tensor,
    *,
    sampling_steps: int = 25,
    cfg_scale: float = 1.5,
    cfg_channels: int | None = 3,
) -> Iterator[DDIMStep]:
    """Walk the sampler from index sampling_steps - 1 (timestep 999) down to 0, one teacher evaluation at a time.

    States are kept in at least float32; no clipping. The arrival at index 0 is the sample.
    """
    if cfg_channels is not None and cfg_channels < 0:
        raise ValueError(f"cfg_channels: got {cfg_channels}; expected None or at least 0")
    timesteps, a = respaced_timesteps(sampling_steps), alphas_cumprod().tolist()
    x = noise_Bchw.to(torch.promote_types(noise_Bchw.dtype, torch.float32))
    for index in reversed(range(sampling_steps)):
        a_here = a[timesteps[index]]
        a_next = a[timesteps[index - 1]] if index > 0 else 1.0
        epsilon = guided_epsilon(teacher, x, timesteps[index], labels_B, cfg_scale=cfg_scale, cfg_channels=cfg_channels)
        x0 = (x - math.sqrt(1.0 - a_here) * epsilon) / math.sqrt(a_here)
        x = math.sqrt(a_next) * x0 + math.sqrt(1.0 - a_next) * epsilon
        yield DDIMStep(index, x0, x)
