"""The GAN fine-tune's losses, adaptive weight and heads against their definitions, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ard.common.process import Process
from ard.common.streams import batch_indices
from ard.training.gan import LocalBatchNorm
from ard.training.losses import sample_mse
from ard.training.objectives import MicroBatch
from student.distributed_worker import BATCH, gan_objective, tiny_store, tiny_student, tiny_teacher
from torch import Tensor, nn

ULPS = 64 * torch.finfo(torch.float64).eps


class Gan:
    """Objective and student in float64, and one batch."""

    def __init__(self, folder: Path, device: torch.device):
        dtype, store = torch.float64, tiny_store(folder)
        teacher = tiny_teacher(dtype, device)
        self.student = tiny_student(teacher)
        self.objective = gan_objective(self.student, teacher, store, Process(device=device)).observe(dtype, None)
        self.discriminator, self.teacher = self.objective.discriminator, self.objective.teacher
        self.device, self.batch = device, self.objective.batch(0, BATCH)
        self.states, self.targets, (self.labels,) = self.objective.rows(self.batch)

    def backward(self, step: int) -> dict[str, float]:
        micro = MicroBatch(step, self.batch, slice(0, BATCH))
        return {k: float(v) for k, v in self.objective.backward(self.student, micro, 1.0, nullcontext).items()}

    def real_batch(self, step: int) -> Tensor:
        return batch_indices(0, step, BATCH, len(self.objective.real), "real")

    def logits(self, images, labels):
        summary_BC, features = self.objective.features(images, labels)
        return self.discriminator(features, summary_BC)

    def gradients(self, loss, module: nn.Module) -> list[Tensor]:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(loss, parameters, retain_graph=True))


@pytest.fixture
def gan(tmp_path, device) -> Gan:
    return Gan(tmp_path, device)


def assert_gradients(module: nn.Module, expected: list[Tensor]) -> None:
    got = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(got, expected, strict=True):
        assert (gradient - other).abs().max() <= ULPS * scale


def test_adaptive_weight_and_gradients_are_the_definition(gan):
    predictions = gan.student(gan.states, gan.labels)
    fake, config = predictions[:, -1], gan.objective.config
    regression, generator = sample_mse(predictions, gan.targets).mean(), -gan.logits(fake, gan.labels).mean()
    head = gan.student.final_layers[-1].linear
    of_regression, of_generator = (gan.gradients(loss, head)[0].norm() for loss in (regression, generator))
    weight = float(of_regression) / (float(of_generator) + 1e-4)
    student_gradients = gan.gradients(regression + config.factor * weight * generator, gan.student)
    real, (real_labels,) = gan.objective.real.rows(gan.real_batch(config.start))
    real, real_labels = real.to(gan.device), real_labels.to(gan.device)
    hinge = F.relu(1 - gan.logits(real, real_labels)).mean() + F.relu(1 + gan.logits(fake.detach(), gan.labels)).mean()
    discriminator_gradients = gan.gradients(hinge, gan.discriminator)

    got = gan.backward(config.start)
    expected = {"loss": regression.item(), "generator_loss": generator.item(), "generator_weight": weight}
    expected["discriminator_loss"] = hinge.item()
    for name, value in expected.items():
        assert abs(got[name] - value) <= ULPS * abs(value), name
    assert_gradients(gan.student, student_gradients)
    assert_gradients(gan.discriminator, discriminator_gradients)


def test_before_its_start_the_gan_only_trains_the_heads(gan):
    predictions = gan.student(gan.states, gan.labels)
    expected = gan.gradients(sample_mse(predictions, gan.targets).mean(), gan.student)
    gan.backward(0)
    assert_gradients(gan.student, expected)
    assert all(parameter.grad is not None for parameter in gan.discriminator.parameters())
    assert all(parameter.grad is None for parameter in gan.teacher.parameters())


def test_features_are_the_tokens_after_each_block(gan):
    images = gan.states[:, 0]
    _, outputs = gan.objective.features(images, gan.labels)
    for depth in range(1, len(outputs) + 1):
        teacher, tokens = tiny_teacher(torch.float64, gan.device), outputs[depth - 1]
        teacher.blocks = teacher.blocks[:depth]
        shift, scale = teacher.final_layer.adaLN_modulation(gan.objective.condition(gan.labels))[:, None].chunk(2, -1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        expected = teacher(images, torch.zeros_like(gan.labels), gan.labels)
        got = teacher.unpatchify(teacher.final_layer.linear(tokens)[:, None], 1)[:, 0]
        assert (got - expected).abs().max() <= ULPS * expected.abs().max()


def test_spectral_norms_take_one_power_iteration_per_update(gan):
    spectral = gan.discriminator.heads[0].pointwise[0].parametrizations.weight
    u, v = spectral[0]._u.clone(), spectral[0]._v.clone()
    gan.backward(0)
    gan.backward(2)
    assert torch.equal(spectral[0]._u, u) and torch.equal(spectral[0]._v, v)
    gan.objective.update()
    u = F.normalize(spectral.original.flatten(1) @ v, dim=0)
    assert (spectral[0]._u - u).abs().max() <= ULPS
    assert (spectral[0]._v - F.normalize(spectral.original.flatten(1).T @ u, dim=0)).abs().max() <= ULPS


@pytest.mark.parametrize(("count", "group"), [(8, 4), (6, 3), (3, 3), (5, 1)])
def test_local_batch_norm_is_batch_norm_of_each_group(count, group, device):
    norm = LocalBatchNorm(5, virtual_batch=group).to(device, torch.float64)
    x = torch.randn(count, 5, 7, dtype=torch.float64, device=device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = [F.batch_norm(rows, None, None, norm.weight, norm.bias, training=True) for rows in x.split(group)]
    assert (norm(x) - torch.cat(expected)).abs().max() <= ULPS * norm.weight.abs().max()
    with pytest.raises(ValueError, match=r"got 5 samples; expected a multiple of 2"):
        LocalBatchNorm(3, virtual_batch=2)(torch.zeros(5, 3, 7))
