"""What a recipe needs before it runs: parameters, FLOPs, memory per GPU, disk. Nothing is allocated or trained."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # private: without it there is no --dry-run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ard.conditions.sources import Classes
from ard.config.choices import autocast
from ard.config.recipe import Recipe
from ard.config.sections import micro_batch_size
from ard.diffusion.guidance import Guidance
from ard.diffusion.solvers import solver_of
from ard.models.config import Condition, ModelConfig
from ard.models.families import make_teacher
from ard.models.flops import flop_table
from ard.models.student import ARDStudent
from ard.storage.files import readable_size
from ard.training.gan import Discriminator
from ard.training.stages import store_spec
from ard_kernels import flops

STAGES = ("distill", "gan")
FLOAT32 = torch.float32.itemsize


def plan(recipe: Recipe, *, stage: str = "distill", world_size: int = 1) -> dict[str, Any]:
    """JSON values: shapes, parameters, FLOPs, memory (bytes per GPU, estimated), disk (bytes).

    stage: "distill" or "gan". Memory counts weights, gradients, AdamW's moments and EMA in float32, and every tensor
    that the student's forward keeps for its backward, found by running it on shapes alone; not the workspace of
    libraries, nor fragmentation, nor what the GAN stage keeps of the teacher and the discriminator.
    """
    gan = recipe.gan if stage == "gan" else None
    if stage not in STAGES or (stage == "gan" and gan is None):
        raise ValueError(f"plan: stage is {stage!r}; expected one of {STAGES}, and a gan section for 'gan'")
    config = recipe.distill if gan is None else gan.train
    local = micro_batch_size(config.batch_size, world_size, recipe.execution.accumulation)
    counts, trajectories = parameters(recipe, stage), store_spec(recipe, "", _Planned(recipe))
    model, S, trainable = recipe.model, recipe.steps, counts["student, trainable"]
    forwards = flop_table(model, steps=S, history_layers=recipe.student.history_layers, **_mask(recipe))
    overhead = forwards["student_training_forward"]["counted"] / forwards["baseline_sampling"]["counted"] - 1.0
    step, one, two = step_flops(recipe), saved_bytes(recipe, 1), saved_bytes(recipe, 2)
    held = 5 * trainable * FLOAT32
    forward, drawn = forwards["teacher_forward"]["counted"], config.steps * config.batch_size
    stored, online = (n * sample_forwards(recipe) * forward for n in (recipe.trajectories.count, drawn))
    saved = 2 * (counts["student"] + trainable) + 3 * counts.get("discriminator", 0)
    frozen = counts["teacher"] if stage == "gan" or recipe.trajectories.online else 0
    beside = (frozen + 4 * counts.get("discriminator", 0)) * FLOAT32
    return {
        "stage": stage,
        "processes": world_size,
        "shapes": {
            "states (B, S, c, h, w) of a micro-batch": [local, S, *model.image_shape],
            "tokens (B, T, C)": [local, S * model.tokens, model.hidden_size],
            "heads, head width": [model.num_heads, model.head_dim],
        },
        "parameters": counts,
        "flops": {
            "teacher, one forward": forwards["teacher_forward"]["counted"],
            "student, one training forward": forwards["student_training_forward"]["counted"],
            "overhead of the history": overhead,
            "student, forward and backward of one sample": step,
            f"one step, batch {config.batch_size}": step * config.batch_size,
            f"all {config.steps} steps": step * config.batch_size * config.steps,
            "all trajectories, stored once": stored,
            "all trajectories, made online": online,
        },
        "history": history_overheads(model, S, recipe.student.history_layers),
        "trajectories": {
            "teacher forwards of one": sample_forwards(recipe),
            "teacher forwards per step, online": sample_forwards(recipe) * config.batch_size,
            "a step's trajectories over its training, online": sample_forwards(recipe) * forward / step,
            "disk of the store": readable_size(trajectories.row_bytes * trajectories.count),
            "cheaper in FLOPs": "online" if online <= stored else "stored",
            "this recipe": "online" if recipe.trajectories.online else "stored",
        },
        "memory": {
            "weights, gradients, moments, EMA; DDP": held,
            "weights, gradients, moments, EMA; FSDP": math.ceil(held / world_size),
            "teacher; discriminator, its gradients and moments": beside,
            "kept for backward": one + (two - one) * (local - 1),
        },
        "disk": {
            "trajectories": 0 if recipe.trajectories.online else trajectories.row_bytes * trajectories.count,
            "checkpoints": (recipe.execution.keep_last + 1) * saved * FLOAT32,
        },
    }


class _Planned(Classes):
    """A source of conditions for its sizes: prompts need not be encoded yet."""

    def __init__(self, recipe: Recipe):
        prompts = (Condition("prompt", classes=1),)
        steered = any(not condition.classes for condition in recipe.model.conditions)
        super().__init__(prompts if steered else recipe.model.conditions)


def history_overheads(model: ModelConfig, steps: int, history_layers: int) -> dict[str, float]:
    """FLOPs that history adds to sampling, by the formula, for the paper's masks and for this and every layer."""
    masks = {"M2": (2, 0), "M3": (1, 1), "M4": (None, 0)}
    baseline = flops.baseline_sampling(model, steps)
    return {
        f"{name}, N = {layers} of {model.depth}": flops.history(model, steps, layers, window, sink) / baseline
        for layers in dict.fromkeys((history_layers, model.depth))
        for name, (window, sink) in masks.items()
    }


def parameters(recipe: Recipe, stage: str) -> dict[str, int]:
    """Counts by model."""
    with FakeTensorMode():
        student = _student(recipe)
        counts = {
            "teacher": _count(make_teacher(recipe.model)),
            "student": _count(student),
            "student, trainable": sum(p.numel() for p in student.parameters() if p.requires_grad),
        }
        if stage == "gan" and recipe.gan is not None:
            counts["discriminator"] = _count(Discriminator(recipe.model.hidden_size, recipe.model.depth, recipe.gan))
    return counts


def sample_forwards(recipe: Recipe) -> int:
    """Teacher forwards of one trajectory: two per evaluation under guidance, and two evaluations in a Heun or midpoint
    step.

    The last Heun step evaluates at the data's time too.
    """
    config, convention = recipe.trajectories, recipe.model.CONVENTION
    interval = None if config.cfg_interval is None else convention.check_interval(config.cfg_interval)
    guidance = Guidance(config.cfg_scale, config.cfg_channels, interval)
    solver, grid = solver_of(convention, config.solver), convention.grid(config.sampling_steps, config.shift)
    times = []
    for here, there in list(pairwise(grid))[: config.sampling_steps - config.keep[-1]]:
        second = {"heun": [there], "midpoint": [(here + there) / 2]}.get(solver, [])
        times += [here, *second]
    return sum(2 if guidance.applies(time) else 1 for time in times)


def step_flops(recipe: Recipe) -> int:
    """Forward and backward of one sample, counted on shapes; with activation checkpointing the blocks run twice.

    What takes PyTorch's attention is counted by its matmuls: a fused kernel of the CPU counts as nothing.
    """
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _student(recipe)(*_inputs(recipe, 1)).sum().backward()
    return counter.get_total_flops()


def saved_bytes(recipe: Recipe, batch: int) -> int:
    """Bytes of the distinct tensors that the student's forward saves for backward, weights excluded."""
    saved: dict[StorageWeakRef, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    context = autocast(recipe.execution.precision, torch.device("cpu"))
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), context():
        student = _student(recipe)
        predictions = student(*_inputs(recipe, batch))
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in student.parameters()}
        del predictions
    return sum(size for storage, size in saved.items() if storage not in weights)


def _student(recipe: Recipe) -> ARDStudent:
    student = ARDStudent(
        recipe.model, steps=recipe.steps, history_layers=recipe.student.history_layers, **_mask(recipe)
    )
    for block in student.blocks:
        block.recompute = recipe.execution.activation_checkpointing
    return student


def _mask(recipe: Recipe) -> dict[str, Any]:
    return {"window": recipe.student.window, "sink": recipe.student.sink}


def _inputs(recipe: Recipe, batch: int) -> tuple[Tensor, ...]:
    return torch.empty(batch, recipe.steps, *recipe.model.image_shape), *recipe.model.blank_conditions(batch)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
