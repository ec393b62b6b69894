"""The training loop of teacher, student and GAN fine-tune: on one process or many, resumable bit for bit."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ard.common.process import Process
from ard.config.choices import autocast
from ard.config.sections import ExecutionConfig, TrainConfig, micro_batch_size
from ard.storage.files import FolderLock, write_json
from ard.training.distributed import spread, whole
from ard.training.ema import Ema
from ard.training.log import RunLog, summary_writer_class
from ard.training.objectives import MicroBatch, Objective
from ard.training.optim import adamw, clip_gradients
from ard.training.run_state import Run, RunState

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
            self.log = self._begin(run) if run else RunLog(None)
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
        with stop_signals() as received, self._lock, frozen_heap(self.process.device):
            while self.step < config.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                batch = objective.batch(self.step, config.batch_size)
                scalars = self._backward(batch, received)
                scalars.update(objective.reduce(), grad_norm=clip_gradients(self.optimizer, config.grad_clip))
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
                    self._state(self.run).save(self.step, self.log.pending())
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

    def _state(self, run: Run) -> RunState:
        sizes = {"steps": self.config.steps, "keep_last": self.execution.keep_last}
        return RunState(run, self.process, self.model, self.ema, self.optimizer, self.objective, **sizes)

    def _begin(self, run: Run) -> RunLog:
        """The run's log, up to its newest good checkpoint, if there is one: that is loaded."""
        if self.execution.tensorboard:
            summary_writer_class()
        self.step, pending = self._state(run).load()
        folder = run.folder if self.process.is_main else None
        return RunLog(folder, self.step, pending, tensorboard=self.execution.tensorboard)

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


@contextmanager
def frozen_heap(device: torch.device) -> Iterator[None]:
    """Garbage collection leaves alone what is there already: in a small model's steps looking through it took 4 %.

    On a GPU what is garbage already goes first: it may hold memory of it.
    """
    if device.type != "cpu":
        gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
