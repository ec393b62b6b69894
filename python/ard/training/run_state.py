"""What a run keeps of itself, so that it can continue bit for bit: two verbs, `save` and `load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ard.common.process import Process
from ard.config.recipe import Recipe, recipe_text
from ard.storage import checkpoints
from ard.storage.files import remove_temporary, write_text
from ard.training.distributed import assign, whole
from ard.training.ema import Ema
from ard.training.objectives import Objective
from ard.training.optim import load_optimizer, optimizer_tensors


@dataclass(frozen=True)
class Run:
    """Where a run is kept: <folder>/config.yaml, log.jsonl and checkpoints."""

    folder: Path
    facts: Mapping[str, Any]  # JSON values for readers of its checkpoints: kind, the model's sizes, ...
    identity: Mapping[str, Any] = field(default_factory=dict)  # what must be equal for the run to continue
    resume: bool = True  # from the newest good checkpoint; False starts anew and removes those that are there
    recipe: Recipe | None = None  # for config.yaml

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class RunState:
    """All that training changes, on every rank; the main one writes, in the folder of ``run``."""

    run: Run
    process: Process
    model: nn.Module
    ema: Ema
    optimizer: torch.optim.AdamW
    objective: Objective
    steps: int  # of the run in all
    keep_last: int  # checkpoints

    def save(self, step: int, log: Mapping[str, Any]) -> None:
        """Writes the checkpoint of ``step``; every rank takes part in collecting. log: what no line holds yet."""
        parts = {
            "model": self._collected(self.model.state_dict()),
            "ema": self._collected(self.ema.state),
            "optimizer": self._collected(optimizer_tensors(self.model, self.optimizer)),
            "rng": generator_states(self.process),
            **self.objective.tensors(),
        }
        if self.process.is_main:
            facts = {**self.run.facts, "steps": self.steps, "identity": dict(self.run.identity), "log": log}
            checkpoints.save(self.run.checkpoints, step, parts, facts, keep_last=self.keep_last)
        self.process.barrier()

    def load(self) -> tuple[int, Mapping[str, Any] | None]:
        """The newest good checkpoint's step and pending log, after loading it; (0, None) without one.

        Then makes the run's folder ready: what killed writers have left is removed, config.yaml is written. Raises
        ValueError, before anything is written, for a run of another identity, and on every rank unless all see one.
        """
        run, step, log = self.run, 0, None
        checkpoint = checkpoints.newest(run.checkpoints) if run.resume else None
        self._require_agreement(checkpoint)
        if checkpoint:
            require_same(checkpoint, run.identity)
            step, log = checkpoint.step, checkpoint.facts["log"]
            state = self.model.state_dict()
            for name, value in checkpoint.read("model").items():
                assign(state[name], value)
            self.ema.load(checkpoint.read("ema"))
            load_optimizer(self.model, self.optimizer, checkpoint.read("optimizer"))
            self.objective.load(checkpoint.read)
            set_generators(self.process, checkpoint.read("rng"))
        self.process.barrier()
        if self.process.is_main:  # nothing has been written so far: a refusal changes nothing
            run.folder.mkdir(parents=True, exist_ok=True)
            remove_temporary(run.folder)
            if not run.resume:
                checkpoints.remove_all(run.checkpoints)
            if run.recipe:
                write_text(run.folder / "config.yaml", recipe_text(run.recipe))
            if checkpoint:  # what was finished may have steps to go now
                checkpoints.set_steps(checkpoint, self.steps)
            checkpoints.tidy(run.checkpoints, step, keep_last=self.keep_last)
        return step, log

    def _collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU of the main rank; one at a time is whole on the others."""
        collected = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.process.is_main:
                collected[name] = full.cpu()
        return collected

    def _require_agreement(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        mark = [checkpoint.step, int(checkpoint.sha256["model"][:15], 16)] if checkpoint else [0, 0]
        marks = self.process.gather(torch.tensor([mark], device=self.process.device))
        if not (marks == marks[0]).all():
            raise ValueError(
                f"{self.run.checkpoints}: the processes found different newest checkpoints, of steps "
                f"{marks[:, 0].tolist()}; expected one folder that all of them see"
            )


def generator_states(process: Process) -> dict[str, Tensor]:
    """States of torch's generators, a row per rank. (The trainer itself draws from (seed, step) alone.)"""
    states = {"cpu": process.gather(torch.get_rng_state()[None])}
    if process.device.type == "cuda":
        states["cuda"] = process.gather(torch.cuda.get_rng_state(process.device)[None])
    return states


def set_generators(process: Process, states: Mapping[str, Tensor]) -> None:
    """A rank that was not there when the states were saved keeps its own. (torch crashes on rows: copies.)"""
    if process.rank < len(states["cpu"]):
        torch.set_rng_state(states["cpu"][process.rank].clone())
        if process.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][process.rank].clone(), process.device)


def require_same(checkpoint: checkpoints.Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first setting in which a checkpoint's run differs."""
    stored, asked = flattened(checkpoint.facts["identity"]), flattened(identity)
    for name in sorted(stored.keys() | asked.keys()):
        if stored.get(name) != asked.get(name):
            raise ValueError(
                f"{checkpoint.folder.parent.parent} is a run with {name}={stored.get(name)!r}; expected "
                f"{asked.get(name)!r} to continue it. Choose another folder, or start it anew"
            )


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; tuples as lists."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
