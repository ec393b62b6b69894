"""gpu_check.jsonl: all that a run has done and found, an event per line, only ever appended: whole at any moment.

An event names its stage and `at`, seconds of this machine's monotonic clock. Besides it has
  environment             a process enters the stage: device, commit, versions
  begin, limit            a piece of work begins, which may take so many seconds; then one of
  end                     it is done
  leave                   its stage's time was over before it was done: --continue begins it again
  crash                   it ended its process, and is not begun again
  row                     a result
  failure                 what makes the stage fail
  status, summary, facts  the stage is left: passed or failed (finished), cut (its time was over), crashed;
                          or it is to be gone on with: running
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

FINISHED = ("passed", "failed")


@dataclass
class Found:
    """A stage, as its events add up."""

    environment: dict = field(default_factory=dict)
    status: str = "running"
    summary: str = ""
    seconds: float = 0.0
    facts: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    entered: bool = False  # by a process that has not left it since
    ended: set[str] = field(default_factory=set)
    crashed: list[str] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)  # pieces in work, innermost last: when their time is over
    at: float = 0.0

    def take(self, event: dict) -> None:
        if self.entered and event.get("status") != "running":
            self.seconds += event["at"] - self.at
        self.at = event["at"]
        match event:
            case {"environment": environment}:
                self.environment, self.entered = environment, True
            case {"begin": label, "limit": limit}:
                self.begun[label] = self.at + limit
            case {"end": label}:
                del self.begun[label]
                self.ended.add(label)
            case {"leave": label}:
                del self.begun[label]
            case {"crash": label}:  # the pieces around it were interrupted, and are begun anew
                self.crashed.append(label)
                self.begun.clear()
            case {"row": row}:
                self.rows.append(row)
            case {"failure": text}:
                self.failures.append(text)
            case {"status": status, "summary": summary}:
                self.status, self.summary, self.entered = status, summary, False
                self.facts = event.get("facts", {})
                self.begun.clear()

    def content(self, stage: str) -> dict:
        """As the result files of the other rooms (benchmarks/schema.json)."""
        told = {"environment": self.environment, "stage": stage, "status": self.status, "summary": self.summary}
        told |= {"seconds": round(self.seconds, 2), **self.facts}
        return told | {"failures": self.failures, "rows": self.rows}


class Log:
    NAME = "gpu_check.jsonl"

    def __init__(self, folder: Path):
        self.path = folder / self.NAME

    def write(self, stage: str, **event) -> None:
        line = json.dumps({"stage": stage, "at": round(time.monotonic(), 3), **event})
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def events(self) -> list[dict]:
        """Without what stands behind the last line's end: it is being written, or its process was ended in it."""
        text = self.path.read_text() if self.path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def read(self) -> dict[str, Found]:
        """Stages by name, in the order in which they were entered first."""
        stages: dict[str, Found] = {}
        for event in self.events():
            stages.setdefault(event["stage"], Found()).take(event)
        return stages

    def forget(self, stages: Collection[str] = ()) -> None:
        """Drop what is known of `stages`, and a torn last line."""
        kept = [json.dumps(event) + "\n" for event in self.events() if event["stage"] not in stages]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
