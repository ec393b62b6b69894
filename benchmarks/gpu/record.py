"""What a stage sees of its run (device, time left), and where it puts what it finds (log.py).

A stage works in pieces. A kernel that hangs or breaks the CUDA context ends its process; the stage is then entered
again, with the rows it has, and goes on behind the piece that is to blame.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from ard_kernels.common.gpu_support import architecture
from benchmarks.gpu.log import Found, Log
from benchmarks.rows import describe, environment

ROOT = Path(__file__).resolve().parents[2]
# Seconds for a piece of work that compiles an op's kernels and runs them a thousand times, at the very most.
LIMIT = 45.0
# For one that has Inductor compile a small network.
COMPILE_LIMIT = 120.0
# Exit status of a stage's process whose CUDA context an error has broken.
BROKEN_CONTEXT = 70
# An op on a backend that ended so many processes of a run is left out of the rest of it.
MOST_CRASHES = 2


class Unfinished(Exception):
    """Raised in a piece of work that was left because its stage's time is over."""


@cache
def run_environment(device: torch.device) -> dict:
    return environment(device) | {"dry_run": device.type == "cpu", "architecture": f"sm{architecture(device)}"}


@dataclass
class Record:
    """One stage in the log of `folder`; what was found of it before, in an interrupted process, is taken over."""

    stage: str
    folder: Path
    device: torch.device
    deadline: float  # of time.monotonic()
    facts: dict = field(default_factory=dict)
    cut: bool = False  # some of its work was left for want of time

    def __post_init__(self):
        self.log = Log(self.folder)
        self.environment, known = run_environment(self.device), self.log.read()
        found = known.get(self.stage, Found())
        self.rows, self.failures, self.ended, self.crashed = found.rows, found.failures, found.ended, found.crashed
        # Of all stages, but for what --only has left of a run of something else.
        same = [other for other in known.values() if other.environment == self.environment]
        self.ended_processes = [label for other in same for label in other.crashed]
        self.pieces = 0  # begun in this process
        self.log.write(self.stage, environment=self.environment)

    @property
    def dry(self) -> bool:
        """No GPU: tiny shapes, CPU tensors, Triton's interpreter; the times mean nothing."""
        return self.device.type == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """Asked before a piece of work: whether to leave it. A process takes one at least, whatever the time."""
        over = self.pieces > 0 and self.seconds_left <= 0
        self.cut |= over
        return over

    def add(self, row: dict, line: str = "") -> None:
        self.rows.append(row)
        self.log.write(self.stage, row=row)
        if line:
            print(f"  {line}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.log.write(self.stage, failure=text)
        print(f"  FAILED {text}", flush=True)

    def given_up(self, op: str, backend: str) -> bool:
        """Whether `op` has ended so many processes on `backend` that the rest of its pieces is not run."""
        labels = [label.split() for label in self.ended_processes]
        return sum(w[0].removesuffix("_packed") == op and w[-1] == backend for w in labels) >= MOST_CRASHES

    def attempt(self, label: str, run: Callable[[], object], limit: float = LIMIT) -> None:
        """Call `run` as a piece of work, unless it was done before; what it raises is a failure of this stage."""
        if label in self.ended or label in self.crashed:
            return
        try:
            with self.piece(label, limit):
                run()
        except Unfinished:
            self.cut = True
        except Exception as error:
            self.fail(f"{label}: {describe(error)}")

    @contextmanager
    def piece(self, label: str, limit: float = LIMIT) -> Iterator[None]:
        """Work that is to blame when the process ends inside, and for which it is ended after `limit` seconds."""
        self.pieces += 1
        self.log.write(self.stage, begin=label, limit=limit)
        how = "leave"
        try:
            yield
            if not self.dry:
                torch.cuda.synchronize(self.device)  # what its kernels did shows here
            how = "end"
        except Unfinished:
            raise
        except Exception as error:
            how = "end"
            if not self.dry and context_is_broken(self.device):
                self.fail(f"{label}: {describe(error)}; it broke the CUDA context")
                os._exit(BROKEN_CONTEXT)
            raise
        finally:
            self.log.write(self.stage, **{how: label})

    def close(self, status: str, summary: str) -> None:
        self.log.write(self.stage, status=status, summary=summary, facts=self.facts)


def context_is_broken(device: torch.device) -> bool:
    """Whether no CUDA call of this process will work any more."""
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
