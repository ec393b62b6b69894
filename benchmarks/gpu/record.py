"""What a stage sees of its run (device, time left), and its results, written after every row.

A stage works in pieces, and a kernel that hangs or breaks the CUDA context ends its process. The stage is then started
again, with the rows it has, and goes on behind the piece that is to blame.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ard_kernels.gpu_support import architecture
from benchmarks.gpu.files import Progress, results, write_results
from benchmarks.rows import describe, environment

ROOT = Path(__file__).resolve().parents[2]
# Seconds for a piece of work that compiles one kernel and runs it a thousand times, at the very most.
LIMIT = 120.0
# Exit status of a stage's process whose CUDA context an error has broken.
BROKEN_CONTEXT = 70
# A backend that ended so many processes of a stage is left out of the rest of it.
MOST_CRASHES = 3


@dataclass
class Record:
    """Results of one stage in `folder`/<stage>.json; what an interrupted process of it has left there is taken over.

    status: running, then passed, failed (a check failed or the stage raised), or cut (its time was over first).
    """

    stage: str
    folder: Path
    device: torch.device
    deadline: float  # of time.monotonic()
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    status: str = "running"
    summary: str = ""

    def __post_init__(self):
        self.begin = time.monotonic()
        self.environment = environment(self.device) | {"dry_run": self.dry}
        self.environment["architecture"] = f"sm{architecture(self.device)}"
        self.progress = Progress(self.folder, self.stage)
        self.ended, self.crashed, _ = self.progress.pieces()
        earlier = results(self.folder, self.stage)
        if earlier:
            self.rows, self.failures, self.begin = earlier["rows"], earlier["failures"], self.begin - earlier["seconds"]
        self.flush()

    @property
    def dry(self) -> bool:
        """No GPU: tiny shapes, CPU tensors, Triton's interpreter; the times mean nothing."""
        return self.device.type == "cpu"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the stage's time is spent; its first row is always made."""
        return bool(self.rows) and self.seconds_left <= 0

    def add(self, row: dict, line: str = "") -> None:
        self.rows.append(row)
        self.flush()
        if line:
            print(f"  {line}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.flush()
        print(f"  FAILED {text}", flush=True)

    def given_up(self, backend: str) -> bool:
        """Whether `backend` has ended so many processes of this stage that the rest of its pieces is not run."""
        return sum(label.endswith(f" on {backend}") for label in self.crashed) >= MOST_CRASHES

    def attempt(self, label: str, run: Callable[[], object], limit: float | None = None) -> None:
        """Call `run` as a piece of work, unless an earlier process has; what it raises is a failure of this stage.

        On a GPU the process ends, and is started again, if the error broke the CUDA context or `limit` s are up.
        """
        if label in self.ended or label in self.crashed:
            return
        try:
            with self.piece(label, limit):
                run()
        except Exception as error:
            self.fail(f"{label}: {describe(error)}")

    @contextmanager
    def piece(self, label: str, limit: float | None = None) -> Iterator[None]:
        """Work that is to blame when the process ends inside."""
        on_gpu = self.device.type == "cuda"
        self.progress.note("+", label)
        if on_gpu and limit is not None:
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)  # what its kernels did shows here
        except Exception as error:
            if on_gpu and context_is_broken(self.device):
                self.fail(f"{label}: {describe(error)}; it broke the CUDA context")
                os._exit(BROKEN_CONTEXT)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.progress.note("-", label)

    def close(self, status: str, summary: str) -> None:
        self.status, self.summary = status, summary
        self.flush()
        self.progress.path.unlink(missing_ok=True)

    def flush(self) -> None:
        content = {
            "environment": self.environment,
            "stage": self.stage,
            "status": self.status,
            "summary": self.summary,
            "seconds": round(time.monotonic() - self.begin, 2),
            **self.facts,
            "failures": self.failures,
            "rows": self.rows,
        }
        write_results(self.folder, self.stage, content)


def context_is_broken(device: torch.device) -> bool:
    """Whether no CUDA call of this process will work any more."""
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
