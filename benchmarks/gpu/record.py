"""What a stage sees of its run (device, time left) and the file that holds its results, rewritten after every row."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import environment

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Record:
    """Results of one stage in `folder`/<stage>.json.

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
        self.environment = environment(device_words(self.device)) | {"dry_run": self.dry}
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

    def attempt(self, label: str, run) -> None:
        """Call `run`; what it raises is a failure of this stage, and the stage goes on."""
        try:
            run()
        except Exception as error:
            self.fail(f"{label}: {describe(error)}")

    def close(self, status: str, summary: str) -> None:
        self.status, self.summary = status, summary
        self.flush()

    def flush(self) -> None:
        """Write by temporary file and rename: a killed run leaves the last whole file."""
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
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stage}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)


def device_words(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def describe(error: BaseException) -> str:
    """Type, message and the place of an error, on one line."""
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(place[-1].filename).name}:{place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"
