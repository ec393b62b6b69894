"""GAN fine-tune of the student ("R+G", arXiv 2504.11295): regression, and hinge losses on the teacher's features.

    heads        one per block of the teacher, on the block's tokens; projected on the conditioning c, which for a model
                 of text has the mean text in it (`Trunk.summary`)
    L_D          mean relu(1 - D(real)) + mean relu(1 + D(fake))
    L_gan        -mean D(fake), fake = the student's final state
    L_G          L_rec + factor * w * L_gan,  w = |dL_rec/dW| / (|dL_gan/dW| + 1e-4) clamped, W the last head's weight

w is zero before step ``start``, while the heads already learn. The student's backward runs once: the gradients of both
losses with respect to its prediction are added first, and both norms follow from them, as dL/dW = sum of (dL/dtoken)
x (the token's features). Over several processes dL/dW is averaged before the norms, so w is that of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ard.common.process import Process
from ard.common.streams import batch_indices
from ard.config.sections import GanConfig
from ard.data.latents import RealLatents
from ard.data.trajectories import Trajectories
from ard.models.config import ModelConfig
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher
from ard.training.losses import sample_mse
from ard.training.objectives import Autocast, MicroBatch, StudentObjective
from ard.training.optim import adamw, load_optimizer, optimizer_tensors

EPSILON = 1e-4  # of the adaptive weight


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of ``virtual_batch`` consecutive samples and all tokens, in training and afterwards."""

    def __init__(self, channels: int, virtual_batch: int):
        super().__init__()
        self.virtual_batch = virtual_batch
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCL: Tensor) -> Tensor:
        B, C, L = x_BCL.shape
        if B % self.virtual_batch:
            raise ValueError(f"LocalBatchNorm: got {B} samples; expected a multiple of {self.virtual_batch}")
        x = wide(x_BCL).view(-1, self.virtual_batch, C, L)
        variance, mean = torch.var_mean(x, dim=(1, 3), keepdim=True, correction=0)
        y_BCL = ((x - mean) * torch.rsqrt(variance + 1e-5)).view(B, C, L)
        return y_BCL * self.weight[:, None] + self.bias[:, None]


class HeadBlock(nn.Sequential):
    """Spectral-norm convolution over the token sequence (circular), local batch norm, LeakyReLU 0.2."""

    def __init__(self, channels: int, kernel_size: int, virtual_batch: int):
        convolution = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            padding_mode="circular" if kernel_size > 1 else "zeros",
        )
        super().__init__(spectral_norm(convolution), LocalBatchNorm(channels, virtual_batch), nn.LeakyReLU(0.2))


class Head(nn.Module):
    """Tokens (B, L, C) and `Trunk.summary` (B, C) -> one logit per token (B, L), by projection (arXiv 1802.05637)."""

    def __init__(self, channels: int, config: GanConfig):
        super().__init__()
        self.pointwise = HeadBlock(channels, 1, config.virtual_batch)
        self.residual = HeadBlock(channels, config.kernel_size, config.virtual_batch)
        self.projection = spectral_norm(nn.Conv1d(channels, config.projection, 1))
        self.condition = nn.Linear(channels, config.projection)

    def forward(self, x_BLC: Tensor, c_BC: Tensor) -> Tensor:
        h_BCL = self.pointwise(x_BLC.transpose(1, 2))
        h_BCL = (self.residual(h_BCL) + h_BCL) / math.sqrt(2.0)
        projected_BEL, condition_BE = self.projection(h_BCL), self.condition(c_BC)
        return wide((projected_BEL * condition_BE[:, :, None]).sum(dim=1)) / math.sqrt(condition_BE.shape[1])


class Discriminator(nn.Module):
    """One head per block of the teacher; logits (B, blocks * L).

    It stays in eval mode, in which spectral norms only read their singular vectors, so that the number of forwards
    per step (micro-batches, processes) changes nothing; `refine` improves the vectors, once per update.
    """

    def __init__(self, channels: int, depth: int, config: GanConfig):
        super().__init__()
        self.heads = nn.ModuleList(Head(channels, config) for _ in range(depth))
        self.eval()

    def forward(self, features: Sequence[Tensor], c_BC: Tensor) -> Tensor:
        return torch.cat([head(x_BLC, c_BC) for head, x_BLC in zip(self.heads, features, strict=True)], dim=1)

    @torch.no_grad()
    def refine(self) -> None:
        """One power iteration of every spectral norm."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                module.train()
                _ = module.weight
                module.eval()


class GanObjective(StudentObjective):
    """Regression and adversarial loss; holds the discriminator and its optimizer.

    student: the model itself, not what `Trainer` wraps around it. teacher: frozen, on the device.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        student: ARDStudent,
        teacher: Teacher,
        real: RealLatents,
        config: GanConfig,
        *,
        state: str,
        process: Process,
    ):
        super().__init__(trajectories, state=state, seed=config.train.seed, device=process.device)
        self.student, self.teacher, self.real, self.config, self.process = student, teacher, real, config, process
        self.teacher.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):  # the same heads on every rank
            torch.manual_seed(config.train.seed)
            self.discriminator = Discriminator(teacher.config.hidden_size, teacher.config.depth, config)
        self.discriminator.to(process.device)
        self.optimizer = adamw(self.discriminator, config.discriminator_learning_rate, config.discriminator_betas)

    def backward(self, model: nn.Module, micro: MicroBatch, share: float, autocast: Autocast) -> dict[str, Tensor]:
        states, targets, conditions = self.rows(micro.indices)
        with autocast(), input_of(self.student.final_layers[-1].linear) as last_BLC:
            outputs = model(states, *conditions)
        predictions = wide(outputs.detach()).requires_grad_()
        regression = sample_mse(predictions, targets).mean()
        (gradient,) = torch.autograd.grad(regression, predictions)
        scalars = {"loss": regression.detach()}

        fake = predictions[:, -1].detach()
        adversarial = micro.step >= self.config.start
        with autocast(), torch.set_grad_enabled(adversarial):
            summary_BC, features = self.features(fake.requires_grad_(adversarial), *conditions)
        # The heads' graph alone is kept for their own gradient; the teacher's, which is the large one, ends here.
        seen = [x.detach().requires_grad_(adversarial) for x in features]
        with autocast():
            on_fake = self.discriminator(seen, summary_BC)
        if adversarial:
            generator = -on_fake.mean()
            seen_gradients = torch.autograd.grad(generator, seen, retain_graph=True)
            (gan_gradient,) = torch.autograd.grad(features, fake, seen_gradients)
            weight = self.adaptive_weight(gradient[:, -1], gan_gradient, last_BLC[0])
            gradient[:, -1] += self.config.factor * weight * gan_gradient
            scalars |= {"generator_loss": generator.detach(), "generator_weight": weight}
        outputs.backward((gradient * share).to(outputs.dtype))
        return scalars | self.discriminator_backward(on_fake, micro, share, autocast)

    def discriminator_backward(
        self, on_fake: Tensor, micro: MicroBatch, share: float, autocast: Autocast
    ) -> dict[str, Tensor]:
        """Adds the gradient of the hinge loss; the logits of fakes are those of the generator's pass."""
        order = batch_indices(self.seed, micro.step, len(micro.batch), len(self.real), "real")
        latents, conditions = self.real.rows(order[micro.rows])
        latents, conditions = latents.to(self.device), tuple(each.to(self.device) for each in conditions)
        with autocast():
            with torch.no_grad():
                summary_BC, features = self.features(wide(latents), *conditions)
            on_real = self.discriminator(features, summary_BC)
        loss = F.relu(1.0 - on_real).mean() + F.relu(1.0 + on_fake).mean()
        # The heads alone: the logits of fakes are functions of features too.
        (loss * share).backward(inputs=list(self.discriminator.parameters()))
        return {
            "discriminator_loss": loss.detach(),
            "logits_real": on_real.detach().mean(),
            "logits_fake": on_fake.detach().mean(),
        }

    def adaptive_weight(self, regression_Bchw: Tensor, gan_Bchw: Tensor, last_BLC: Tensor) -> Tensor:
        """Scalar w from the gradients of the mean losses of this rank with respect to the final state."""
        p = self.teacher.config.patch_size
        per_head = [
            torch.einsum("blp,blc->pc", patches(gradient, p), wide(last_BLC))
            for gradient in (regression_Bchw, gan_Bchw)
        ]
        regression, gan = self.process.mean(torch.stack(per_head)).flatten(1).norm(dim=1)
        return (regression / (gan + EPSILON)).clamp(0.0, self.config.largest_weight)

    def condition(self, *conditions: Tensor) -> Tensor:
        """The teacher's conditioning c, (B, C), at the time at which it reads final states."""
        time = feature_timestep(self.config, self.teacher.config)
        t_B1 = torch.full((len(conditions[0]), 1), time, device=conditions[0].device)
        return self.teacher.condition(t_B1, *conditions)[:, 0]

    def features(self, x_Bchw: Tensor, *conditions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What steers the samples, (B, C); tokens after every block of the teacher, (B, L, C) each."""
        c_BC, context = self.condition(*conditions), self.teacher.context(*conditions)
        return self.teacher.summary(c_BC, context), self.teacher.block_outputs(x_Bchw, c_BC[:, None], context)

    def reduce(self) -> dict[str, float]:
        # The step's backward has reached every head.
        gradients = cast("list[Tensor]", [parameter.grad for parameter in self.discriminator.parameters()])
        if self.process.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= self.process.world_size
        return {"discriminator_grad_norm": float(nn.utils.get_total_norm(gradients))}

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.discriminator.refine()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self.discriminator, self.optimizer),
        }

    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        self.discriminator.load_state_dict(read("discriminator"))
        load_optimizer(self.discriminator, self.optimizer, read("discriminator_optimizer"))


def feature_timestep(config: GanConfig, model: ModelConfig) -> float:
    """The time at which the teacher reads final states: that of the data, unless the settings name one."""
    return model.CONVENTION.data_time if config.feature_timestep is None else float(config.feature_timestep)


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def patches(images_Bchw: Tensor, patch_size: int) -> Tensor:
    """(B, c, h, w) -> (B, L, patch * patch * c), the order of a final layer's outputs."""
    B, c, h, w = images_Bchw.shape
    p = patch_size
    return images_Bchw.reshape(B, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * c)


@contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the first argument of each call of ``module`` inside the context."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
