"""One rank of test_distributed.py: the cases of a JSON file, one after the other. Also imported by the test itself.

A case is a mapping: name of its run's folder, model (over MODEL), execution (of ExecutionConfig), train (over TRAIN),
dtype, gan, poison (the id of a sample whose loss is NaN), hold (after that many updates, until a file "go" is there).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ard.common.process import Process, started
from ard.config.sections import ExecutionConfig, GanConfig, TrainConfig
from ard.data.latents import LatentsInMemory
from ard.data.trajectories import StoreSpec, TrajectoryStore, generate_store
from ard.models.config import Condition
from ard.models.dit import DiT, DiTConfig
from ard.models.student import ARDStudent
from ard.training.distributed import local, whole
from ard.training.gan import GanObjective
from ard.training.objectives import StudentObjective
from ard.training.optim import trainable
from ard.training.run_state import Run
from ard.training.trainer import NonFiniteError, Stopped, Trainer
from ard.weights.opened import random_teacher, state_sha256
from torch import Tensor

MODEL = DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=1,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
)
COUNT, BATCH, STEPS, RATE = 30, 8, 6, 1e-3
# The norm of the gradients is about 1, so they are clipped.
TRAIN = {"batch_size": BATCH, "steps": STEPS, "learning_rate": RATE, "ema_decay": 0.5, "grad_clip": 0.1, "log_every": 1}
Case = dict[str, Any]


def tiny_store(folder: Path, side: int = 4) -> TrajectoryStore:
    """Trajectories that shrink the noise towards the label."""
    shape, keep = (1, side, side), (15, 5, 0)
    labels = (Condition("labels", classes=3),)
    spec = StoreSpec(COUNT, 16, 0, shape, labels, sampling_steps=25, keep=keep, cfg_scale=1.0, cfg_channels=1)

    def shrink(noise: Tensor, labels: Tensor) -> SimpleNamespace:
        end = (labels.float() - 1).view(-1, 1, 1, 1)
        states = torch.stack([noise * (1 - f) + end * f for f in (0.3, 0.6, 1.0)], dim=1)
        return SimpleNamespace(noise=noise, x0=states, ode=-states, conditions=(labels,))

    return generate_store(folder, spec, shrink)


def tiny_teacher(dtype: torch.dtype, device: torch.device, model: DiTConfig = MODEL) -> DiT:
    return random_teacher(model)[0].to(device, dtype)


def tiny_student(teacher: DiT) -> ARDStudent:
    """History in the first block; every weight gets a gradient from the first step on."""
    student = ARDStudent.from_teacher(teacher, steps=3, history_layers=1)
    student.unfreeze()
    return student


class Observed:
    """Records (step, first row, sample ids) of every micro-batch, and can poison a sample."""

    dtype, poison = torch.float32, None

    def observe(self, dtype: torch.dtype, poison: int | None):
        self.dtype, self.poison, self.seen = dtype, poison, []
        return self

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        states, targets, conditions = super().rows(indices)
        targets[indices == self.poison] = torch.nan
        return states.to(self.dtype), targets.to(self.dtype), conditions

    def backward(self, model, micro, share, autocast) -> dict[str, Tensor]:
        self.seen.append((micro.step, micro.rows.start, micro.indices.tolist()))
        return super().backward(model, micro, share, autocast)


class ObservedStudent(Observed, StudentObjective):
    pass


class ObservedGan(Observed, GanObjective):
    pass


def gan_objective(student: ARDStudent, teacher: DiT, store: TrajectoryStore, process: Process) -> ObservedGan:
    """Groups of 4 samples share a batch norm: the rows of one of two ranks. The generator's part starts at step 2."""
    dtype, generator = teacher.weight.dtype, torch.Generator().manual_seed(3)
    latents = torch.randn(20, *store.spec.image_shape, generator=generator).to(dtype)
    real = LatentsInMemory("toy", latents, torch.arange(20) % 3)
    config = GanConfig(TrainConfig(**TRAIN), start=2, kernel_size=3, projection=8, virtual_batch=4)
    objective = ObservedGan(store, student, teacher, real, config, state="x0", process=process)
    objective.discriminator.to(dtype)
    return objective


def make_trainer(case: Case, folder: Path, process: Process) -> Trainer:
    """A trainer of the run <folder>/<name>, from its newest checkpoint if there is one."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    teacher = tiny_teacher(dtype, process.device, replace(MODEL, **case.get("model", {})))
    student, store = tiny_student(teacher), TrajectoryStore(folder / "store")
    train = TrainConfig(**{**TRAIN, **case.get("train", {})})
    if case.get("gan"):
        objective = gan_objective(student, teacher, store, process)
    else:
        objective = ObservedStudent(store, state="x0", seed=train.seed, device=process.device)
    return Trainer(
        student,
        objective.observe(dtype, case.get("poison")),
        train,
        execution=ExecutionConfig(**{"save_every": 1000, **case.get("execution", {})}),
        process=process,
        run=Run(folder / case["name"], {"kind": "student"}),
    )


def run_case(case: Case, folder: Path, process: Process | None = None) -> Trainer:
    """Trains as ``case`` says; what the rank saw goes to seen-<first step>-<rank>.json in the run's folder."""
    process = process or Process()
    torch.manual_seed(100 + process.rank)  # a stream per rank
    trainer = make_trainer(case, folder, process)
    facts: dict[str, Any] = {"generator": torch.get_rng_state().tolist()}
    path = folder / case["name"] / f"seen-{trainer.step}-{process.rank}.json"

    def hold(step: int) -> None:
        if step == case["hold"]:
            (trainer.run.folder / f"ready-{process.rank}").touch()
            while not (trainer.run.folder / "go").exists():
                time.sleep(0.01)

    try:
        trainer.fit(on_step=hold if "hold" in case else None)
    except (NonFiniteError, Stopped) as error:
        facts["error"] = str(error)
    facts["last_generator"] = torch.get_rng_state().tolist()
    facts |= {"step": trainer.step, "seen": trainer.objective.seen, "sharded": shares(trainer)}
    facts["weights"] = state_sha256({name: whole(value) for name, value in trainer.model.state_dict().items()})
    if case.get("gan"):
        facts["discriminator"] = state_sha256(trainer.objective.discriminator.state_dict())
    path.write_text(json.dumps(facts))
    process.barrier()
    return trainer


def shares(trainer: Trainer) -> dict[str, float]:
    """Of all elements of the weights, their averages, gradients and moments, the share that this rank holds."""
    parameters, moments = trainable(trainer.model), trainer.optimizer.state
    groups = {
        "weights": list(parameters.values()),
        "averages": [trainer.ema.state[name] for name in parameters],
        "gradients": [parameter.grad for parameter in parameters.values() if parameter.grad is not None],
        "moments": [moments[parameter]["exp_avg"] for parameter in parameters.values() if parameter in moments],
    }
    return {
        name: sum(local(tensor).numel() for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
        for name, tensors in groups.items()
        if tensors
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with started("cpu") as process:
        for case in json.loads((folder / sys.argv[2]).read_text()):
            run_case(case, folder, process)


if __name__ == "__main__":
    main()
