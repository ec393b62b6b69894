"""The trainer as a stage: a small student and a GAN fine-tune on the device against the same on the CPU.

Every run starts from the same weights and reads the same trajectories. Steps are few, so that rounding is all that may
differ: the bounds are on losses, which are means over thousands of elements.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from ard.gan import LatentsInMemory
from ard.parallel import Process
from ard.recipe import Recipe, read_recipe
from ard.sampling import SamplingConfig, sampler
from ard.sources import random_teacher
from ard.stages import distill, finetune, make_trajectories
from ard.store import TrajectoryStore
from ard.student import ARDStudent
from ard.train import Fitted

from benchmarks.gpu.record import COMPILE_LIMIT, LIMIT, Record

SMALL = [
    "model.num_classes=10", "trajectories.count=64", "trajectories.shard_size=64", "trajectories.keep=[3,2,1,0]",
    "trajectories.sampling_steps=4", "trajectories.precision=fp32", "trajectories.dtype=float32",
    "student.history_layers=2", "distill.steps=4", "distill.batch_size=8", "distill.log_every=1", "preview.every=0",
    "execution.precision=fp32", "execution.tensorboard=false", "gan.start=1", "gan.train.steps=3",
    "gan.train.batch_size=6", "gan.train.log_every=1",
]  # fmt: skip
SIZES = ["model.input_size=16", "model.hidden_size=288", "model.depth=4", "model.num_heads=4"]  # D = 72
TINY = ["model.input_size=4", "model.hidden_size=16", "model.depth=2", "model.num_heads=2"]
# Largest relative differences of a loss. fp32: sums in another order (a GPU may multiply in TF32 where the user allows
# it; PyTorch's default does not). bf16: its rounding unit times the depth of the network, generously.
FP32, BF16 = 1e-3, 0.1


def trainer(record: Record) -> str:
    """Losses of each way to run, a run that was interrupted, samples; last what Inductor has to compile for."""
    recipe = read_recipe("imagenet256_gan", [*SMALL, *(TINY if record.dry else SIZES)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, sha256 = random_teacher(recipe.model)
        store = make_trajectories(recipe, teacher, sha256, folder / "trajectories")
        state = {"teacher": teacher, "sha256": sha256, "store": store}
        reference = cache(lambda: run(recipe, state, folder / "cpu", torch.device("cpu")))

        def check(what: str, bound: float, **changes) -> None:
            changed = replace(recipe, execution=replace(recipe.execution, **changes))
            compare(record, what, run(changed, state, folder / what, record.device), reference(), bound)

        work = {
            "fp32": lambda: check("fp32", FP32),
            "bf16": lambda: check("bf16", BF16, precision="bf16"),
            "resumption": lambda: check_resumption(record, recipe, state, folder),
            "GAN fine-tune": lambda: check_gan(record, recipe, state, folder),
            "sampling in a CUDA graph": lambda: check_sampling(record, recipe, state),
            "activation checkpointing": lambda: check("activation checkpointing", FP32, activation_checkpointing=True),
            "compiled": lambda: check("compiled", FP32, compile=True),
        }
        if record.dry:
            del work["compiled"]
        for what, check_it in work.items():
            if not record.over:
                record.attempt(what, check_it, COMPILE_LIMIT if what == "compiled" else LIMIT)
    return f"{len(record.rows)} checks"


def run(recipe: Recipe, state: dict, folder: Path, device: torch.device) -> Fitted:
    return distill(recipe, state["teacher"], state["sha256"], state["store"], folder, process=Process(device=device))[1]


def compare(record: Record, what: str, got: Fitted, expected: Fitted, bound: float) -> None:
    """Losses of all steps within a relative bound."""
    pairs = zip(got.log, expected.log, strict=True)
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
    record.add({"what": what, "loss_difference": worst, "limit": bound})
    if not worst <= bound:
        record.fail(f"{what}: losses differ from those of the CPU by {worst:.2g}, more than {bound:g}")


def check_resumption(record: Record, recipe: Recipe, state: dict, folder: Path) -> None:
    """2 + 2 steps against 4."""
    half = replace(recipe, distill=replace(recipe.distill, steps=2))
    run(half, state, folder / "halves", record.device)
    halves, whole = (run(recipe, state, folder / name, record.device) for name in ("halves", "whole"))
    equal = all(torch.equal(value, whole.ema.state[name]) for name, value in halves.ema.state.items())
    record.add({"what": "resumption", "equal": equal})
    if not equal:
        record.fail("resumption: a run continued from its checkpoint differs from the uninterrupted one")


def check_gan(record: Record, recipe: Recipe, state: dict, folder: Path) -> None:
    """Losses of regression and discriminator, and the adaptive weight, against the CPU's."""
    logs = [tuned(recipe, state, folder / f"gan {name}", device).log for name, device in devices(record)]
    worst = {
        key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for a, b in zip(*logs, strict=True) if key in b)
        for key in ("loss", "discriminator_loss", "generator_weight")
    }
    record.add({"what": "GAN fine-tune", "differences": worst, "limit": BF16})
    if not max(worst.values()) <= BF16:
        record.fail(f"GAN fine-tune: differs from the CPU's by {worst}")


def devices(record: Record) -> tuple[tuple[str, torch.device], ...]:
    return ("device", record.device), ("reference", torch.device("cpu"))


def tuned(recipe: Recipe, state: dict, folder: Path, device: torch.device) -> Fitted:
    process, store = Process(device=device), state["store"]
    student, _ = distill(recipe, state["teacher"], state["sha256"], store, folder / "student", process=process)
    real = LatentsInMemory("random", *real_latents(store))
    return finetune(
        recipe, student, "random", state["teacher"], state["sha256"], store, real, folder / "gan", process=process
    )[1]


def real_latents(store: TrajectoryStore) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.arange(len(store))
    return store.read("noise", indices), store.read("labels", indices)


def check_sampling(record: Record, recipe: Recipe, state: dict) -> None:
    """Batches of other noise and labels through `ard sample`'s way of sampling, with and without a graph."""
    student = ARDStudent.from_teacher(state["teacher"], steps=recipe.steps, history_layers=2).to(record.device)
    noise, labels = (rows.to(record.device) for rows in real_latents(state["store"]))
    samplers = [
        sampler(student, SamplingConfig(16, batch_size=8, cuda_graph=graph), record.device) for graph in (True, False)
    ]
    equal = all(
        torch.equal(*(sample(noise[rows], labels[rows]) for sample in samplers))
        for rows in (slice(0, 8), slice(8, 16), slice(16, 19))
    )
    record.add({"what": "sampling in a CUDA graph", "equal": equal})
    if not equal:
        record.fail("sampling: the replayed graph's samples differ from eager's")
