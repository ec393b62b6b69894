"""`--dry-run`: the paper's numbers, and estimates that agree with what really happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ard.config.recipe import read_recipe
from ard.models.student import ARDStudent
from ard.training.gan import Discriminator
from ard.training.plan import plan, saved_bytes, step_flops
from ard.weights.opened import random_teacher

pytest.importorskip("yaml")  # of the recipes
TINY = ["model.hidden_size=32", "model.depth=3", "model.num_heads=2", "student.history_layers=2"]


@pytest.mark.slow
def test_dry_run_prints_the_papers_numbers():
    from command_line import ard

    result = ard("distill", "-c", "imagenet256", "--dry-run")
    assert result.exit_code == 0
    for number in ("675,129,632", "682,914,944", "237,242,843,136", "959,843,008,512", "1.1456%", "12.72 GiB"):
        assert number in result.output


def test_shipped_imagenet_recipe_is_the_papers():
    recipe = read_recipe("imagenet256")
    train = recipe.distill
    assert (train.steps, train.batch_size, train.learning_rate, train.weight_decay) == (300_000, 64, 1e-4, 0.0)
    assert (train.ema_decay, train.grad_clip, train.warmup_steps, train.cosine_decay) == (0.9999, 1.0, 0, False)
    assert (recipe.student.history_layers, recipe.student.window, recipe.student.sink) == (6, None, 0)
    assert (recipe.trajectories.sampling_steps, recipe.trajectories.keep) == (25, (15, 10, 5, 0))
    assert (recipe.trajectories.cfg_scale, recipe.trajectories.cfg_channels) == (1.5, 3)
    gan = read_recipe("imagenet256_gan").gan
    assert (gan.train.learning_rate, gan.discriminator_learning_rate, gan.train.batch_size) == (1e-4, 1e-3, 48)
    assert (gan.start, gan.factor, gan.largest_weight, gan.projection, gan.kernel_size) == (3000, 10.0, 1e4, 64, 9)


def test_parameters_disk_and_shards_are_exact():
    recipe = read_recipe("imagenet256", TINY)
    eight, one = (plan(recipe, world_size=n) for n in (8, 1))
    student = ARDStudent(recipe.model, steps=4, history_layers=2)
    trainable = sum(parameter.numel() for parameter in student.parameters()) - student.pos_embed.numel()
    assert eight["disk"]["trajectories"] == 1_280_000 * (5 * 4 * 32 * 32 * 2 + 8)
    assert eight["memory"]["weights, gradients, moments, EMA; DDP"] == 5 * 4 * trainable
    assert eight["memory"]["weights, gradients, moments, EMA; FSDP"] * 8 == 5 * 4 * trainable
    assert one["memory"]["weights, gradients, moments, EMA; FSDP"] == 5 * 4 * trainable
    assert one["flops"]["one step, batch 64"] == eight["flops"]["one step, batch 64"]


def test_gan_plan_counts_the_discriminator():
    recipe = read_recipe("imagenet256_gan", TINY)
    found = plan(recipe, stage="gan")
    heads = sum(parameter.numel() for parameter in Discriminator(32, 3, recipe.gan).parameters())
    assert found["parameters"]["discriminator"] == heads
    student = found["parameters"]["student"] + found["parameters"]["student, trainable"]
    assert found["disk"]["checkpoints"] == 4 * 4 * (2 * student + 3 * heads)
    with pytest.raises(ValueError, match=r"batch_size is 64; expected a multiple of 7: 7 processes"):
        plan(read_recipe("imagenet256"), world_size=7)
    with pytest.raises(ValueError, match=r"a gan section for 'gan'"):
        plan(read_recipe("imagenet256"), stage="gan")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes_are_those_of_a_real_forward(precision, recompute):
    recipe = read_recipe("imagenet256", TINY)
    recipe = replace(
        recipe,
        execution=replace(recipe.execution, precision=precision, activation_checkpointing=recompute),
    )
    teacher, _ = random_teacher(recipe.model)
    student = ARDStudent.from_teacher(teacher, steps=4, history_layers=2).requires_grad_(True)
    student.pos_embed.requires_grad_(False)
    for block in student.blocks:
        block.recompute = recompute
    saved = {}

    def remember(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), context:
        _ = student(torch.randn(2, 4, 4, 32, 32), torch.zeros(2, dtype=torch.int64))
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in own)
    assert saved_bytes(recipe, 2) == pytest.approx(real, rel=0.02)


def test_recomputation_costs_a_forward_and_saves_memory():
    recipe = read_recipe("imagenet256", TINY)
    again = replace(recipe, execution=replace(recipe.execution, activation_checkpointing=True))
    assert saved_bytes(again, 1) < 0.5 * saved_bytes(recipe, 1)
    assert 1.2 * step_flops(recipe) < step_flops(again) < 1.4 * step_flops(recipe)
