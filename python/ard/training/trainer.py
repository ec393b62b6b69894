"""The training loop of teacher, student and GAN fine-tune: on one process or many, resumable bit for bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ard.common.process import Process
from ard.config.choices import autocast
from ard.config.recipe import Recipe, recipe_text
from ard.config.sections import ExecutionConfig, TrainConfig, micro_batch_size
from ard.storage import checkpoints
from ard.storage.files import FolderLock, remove_temporary, write_json, write_text
from ard.training.distributed import assign, spread, whole
from ard.training.ema import Ema
from ard.training.log import RunLog, summary_writer_class
from ard.training.objectives import MicroBatch, Objective
from ard.training.optim import adamw, clip_gradients, load_optimizer, optimizer_tensors

# (updates done, whole averaged weights) -> scalars for the log; called on every rank
Preview = Callable[[int, dict[str, Tensor]], dict[str, float]]


class NonFiniteError(RuntimeError):
    """A loss or gradient norm was not finite; the weights are those before the step."""


class Stopped(SystemExit):
    """A signal has asked training to stop: what does not catch it ends, with the status of a process that it killed."""

    def __init__(self, message: str, signal: int):
        super().__init__(128 + signal)
        self.message = message

    def __str__(self) -> str:
        return self.message


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


@dataclass
class Fitted:
    """What training gives."""

    ema: Ema
    log: list[dict[str, float]]  # step (number of updates done), loss, grad_norm, learning_rate, ...
    step: int  # updates done


class Trainer:
    """Trains ``model`` in place, on its device. Every process makes one, with the same arguments but its ``process``.

    run: keeps checkpoints and log.jsonl, and continues from the newest checkpoint; without one nothing is written.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        *,
        execution: ExecutionConfig | None = None,
        process: Process | None = None,
        run: Run | None = None,
    ):
        self.model, self.objective, self.config, self.run = model, objective, config, run
        self.execution, self.process = execution or ExecutionConfig(), process or Process()
        accumulation = self.execution.accumulation
        self.micro_batch = micro_batch_size(config.batch_size, self.process.world_size, accumulation)
        for block in getattr(model, "blocks", ()):
            block.recompute = self.execution.activation_checkpointing
            if self.execution.compile:
                block.compile()
        self.module = spread(model.train(), self.process, self.execution.strategy)  # forward goes through this one
        self.autocast = autocast(self.execution.precision, self.process.device)
        self.optimizer = adamw(model, config.learning_rate, config.betas, config.weight_decay)
        self.ema = Ema(model, config.ema_decay)
        self.step = 0  # updates done
        self._lock = FolderLock(run.folder) if run and self.process.is_main else nullcontext()
        with ExitStack() as refused:
            refused.push(self._lock)
            self.log = self._resume(run) if run else RunLog(None)
            refused.pop_all()

    def fit(
        self,
        *,
        preview: Preview | None = None,
        preview_every: int = 1,
        on_step: Callable[[int], Any] | None = None,
    ) -> Fitted:
        """Runs until ``config.steps`` updates are done.

        preview: called every ``preview_every`` >= 1 steps and at the end. on_step: called with the updates done.
        Raises Stopped, after the step in which SIGTERM or SIGINT came and a checkpoint, also if it was the last step; a
        second SIGINT does not wait.
        Raises NonFiniteError before the update; <run>/nonfinite-step-N.json then names the samples.
        """
        config, objective, first, started = self.config, self.objective, self.step, time.perf_counter()
        with stop_signals() as received, self._lock:
            while self.step < config.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                batch = objective.batch(self.step, config.batch_size)
                scalars = self._backward(batch, received)
                scalars.update(objective.reduce(), grad_norm=clip_gradients(self.model, config.grad_clip))
                self._require_finite(scalars, batch)
                self.optimizer.step()
                self.ema.update(self.model, self.step)
                objective.update()
                stopped = scalars.pop("stop")
                self.log.add(self.step + 1, {**scalars, "learning_rate": config.learning_rate_at(self.step)})
                self.step += 1
                if preview and (self.step % preview_every == 0 or self.step == config.steps):
                    self.log.extra(preview(self.step, {name: whole(value) for name, value in self.ema.state.items()}))
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now, samples = time.perf_counter(), (self.step - first) * config.batch_size
                    self.log.write(samples / (now - started))
                    first, started = self.step, now
                finished = self.step == config.steps
                if self.run and (self.step % self.execution.save_every == 0 or stopped or finished):
                    self._save(self.run)
                if on_step:
                    on_step(self.step)
                if stopped:
                    break
        self.log.close()
        if received or self.step < config.steps:  # another rank's signal
            where = f"{self.run.folder}: " if self.run else ""
            saved = " and saved; give the command again to continue" if self.run and self.step < config.steps else ""
            text = f"{where}stopped at step {self.step} of {config.steps}{saved}"
            raise Stopped(text, received[0] if received else signal.SIGTERM)
        return Fitted(self.ema, self.log.lines, self.step)

    def _backward(self, batch: Tensor, received: list[int]) -> dict[str, float]:
        """Gradients of the step; the objective's scalars, means over all ranks; "stop" > 0 if any rank must stop."""
        sums: dict[str, Tensor] = {}
        share = 1.0 / self.execution.accumulation
        for micro, is_last in self._micro_batches(batch):
            with self._synchronized(is_last):
                scalars = self.objective.backward(self.module, micro, share, self.autocast)
            for name, value in scalars.items():
                sums[name] = sums.get(name, 0.0) + value * share
        sums["stop"] = torch.full_like(sums["loss"], float(bool(received)))
        # One collective, and one synchronisation with the device, for all of the objective's scalars.
        return dict(zip(sums, self.process.mean(torch.stack(list(sums.values()))).tolist(), strict=True))

    def _micro_batches(self, batch: Tensor) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, contiguous rows in rank order, and whether each is the step's last."""
        accumulation, size = self.execution.accumulation, self.micro_batch
        for number in range(accumulation):
            first = (self.process.rank * accumulation + number) * size
            yield MicroBatch(self.step, batch, slice(first, first + size)), number + 1 == accumulation

    def _synchronized(self, is_last: bool) -> AbstractContextManager:
        """DDP averages gradients with the last micro-batch only; FSDP with each, to keep them sharded."""
        if not is_last and isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def _require_finite(self, scalars: Mapping[str, float], batch: Tensor) -> None:
        """Raises NonFiniteError, on every rank, after writing the ids of the batch and of the samples at fault."""
        if all(math.isfinite(value) for value in scalars.values()):
            return
        losses = []
        with torch.no_grad(), self.autocast():
            for micro, _ in self._micro_batches(batch):
                losses.append(self.objective.sample_losses(self.module, micro))
        samples = batch[~self.process.gather(torch.cat(losses)).isfinite().cpu()].tolist()
        found = {name: str(value) for name, value in scalars.items() if name != "stop"}
        where = ""
        if self.run:
            path = self.run.folder / f"nonfinite-step-{self.step:08d}.json"
            where = f" Written to {path}."
            if self.process.is_main:
                write_json(path, {"step": self.step, **found, "samples": samples, "batch": batch.tolist()})
        raise NonFiniteError(
            f"step {self.step}: {', '.join(f'{name}={value}' for name, value in found.items())}; expected finite "
            f"values. No update was made. Samples whose loss is not finite: {samples or 'none'}, of the batch "
            f"{batch.tolist()}.{where}"
        )

    def _save(self, run: Run) -> None:
        """Writes a checkpoint; every rank takes part in collecting, the main one writes."""
        parts = {
            "model": self._collected(self.model.state_dict()),
            "ema": self._collected(self.ema.state),
            "optimizer": self._collected(optimizer_tensors(self.model, self.optimizer)),
            "rng": self._generator_states(),
            **self.objective.tensors(),
        }
        if self.process.is_main:
            facts = {**run.facts, "steps": self.config.steps, "identity": dict(run.identity)}
            facts["log"] = self.log.pending()
            checkpoints.save(run.checkpoints, self.step, parts, facts, keep_last=self.execution.keep_last)
        self.process.barrier()

    def _collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU of the main rank; one at a time is whole on the others."""
        collected = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.process.is_main:
                collected[name] = full.cpu()
        return collected

    def _resume(self, run: Run) -> RunLog:
        """Loads the newest good checkpoint, if there is one; the log up to there."""
        if self.execution.tensorboard:
            summary_writer_class()
        checkpoint, pending = checkpoints.newest(run.checkpoints) if run.resume else None, None
        self._require_agreement(run, checkpoint)
        if checkpoint:
            require_same(checkpoint, run.identity)
            self.step, pending = checkpoint.step, checkpoint.facts["log"]
            state = self.model.state_dict()
            for name, value in checkpoint.read("model").items():
                assign(state[name], value)
            self.ema.load(checkpoint.read("ema"))
            load_optimizer(self.model, self.optimizer, checkpoint.read("optimizer"))
            self.objective.load(checkpoint.read)
            self._set_generators(checkpoint.read("rng"))
        self.process.barrier()
        if self.process.is_main:  # nothing has been written so far: a refusal changes nothing
            run.folder.mkdir(parents=True, exist_ok=True)
            remove_temporary(run.folder)
            if not run.resume:
                checkpoints.remove_all(run.checkpoints)
            if run.recipe:
                write_text(run.folder / "config.yaml", recipe_text(run.recipe))
            if checkpoint:  # what was finished may have steps to go now
                checkpoints.set_steps(checkpoint, self.config.steps)
            checkpoints.tidy(run.checkpoints, self.step, keep_last=self.execution.keep_last)
        folder = run.folder if self.process.is_main else None
        return RunLog(folder, self.step, pending, tensorboard=self.execution.tensorboard)

    def _require_agreement(self, run: Run, checkpoint: checkpoints.Checkpoint | None) -> None:
        """Raises ValueError on every rank unless all of them have found the same checkpoint."""
        mark = [checkpoint.step, int(checkpoint.sha256["model"][:15], 16)] if checkpoint else [0, 0]
        marks = self.process.gather(torch.tensor([mark], device=self.process.device))
        if not (marks == marks[0]).all():
            raise ValueError(
                f"{run.checkpoints}: the processes found different newest checkpoints, of steps "
                f"{marks[:, 0].tolist()}; expected one folder that all of them see"
            )

    def _generator_states(self) -> dict[str, Tensor]:
        """States of torch's generators, a row per rank. (The trainer itself draws from (seed, step) alone.)"""
        states = {"cpu": self.process.gather(torch.get_rng_state()[None])}
        if self.process.device.type == "cuda":
            states["cuda"] = self.process.gather(torch.cuda.get_rng_state(self.process.device)[None])
        return states

    def _set_generators(self, states: Mapping[str, Tensor]) -> None:
        """A rank that was not there when the states were saved keeps its own. (torch crashes on rows: copies.)"""
        if self.process.rank < len(states["cpu"]):
            torch.set_rng_state(states["cpu"][self.process.rank].clone())
            if self.process.device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"][self.process.rank].clone(), self.process.device)


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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list of the SIGTERMs and SIGINTs received, which do not end the process while the context is open.

    But a second SIGINT does, by KeyboardInterrupt. What is ignored, as SIGINT is in the background, stays so. Signals
    reach the main thread only: elsewhere the list stays empty.
    """
    received: list[int] = []
    first = math.inf

    def note(number: int, _: object) -> None:
        nonlocal first
        now = time.monotonic()
        if number == signal.SIGINT and now > first + 1.0:  # torchrun passes on the one that the terminal sent already
            raise KeyboardInterrupt
        received.append(number)
        first = min(first, now)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
