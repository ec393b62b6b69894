"""The two files of a stage: its results, and, while it runs, the pieces of work that it has begun and ended."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Progress:
    """<stage>.progress: a line per event, + piece begun, - piece ended, ! piece ended its process."""

    def __init__(self, folder: Path, stage: str):
        self.path = folder / f"{stage}.progress"

    def note(self, event: str, label: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{event}{label}\n")

    def pieces(self) -> tuple[set[str], list[str], list[str]]:
        """Labels that ended; those that ended a process; those begun and not ended since, the innermost last."""
        ended, crashed, begun = set(), [], []
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            event, label = line[0], line[1:]
            if event == "+":
                begun.append(label)
            elif event == "-":
                ended.add(label)
                begun.remove(label)
            else:  # those around it were interrupted, and are begun anew
                crashed.append(label)
                begun.clear()
        return ended, crashed, begun


def results(folder: Path, stage: str) -> dict | None:
    """What a stage has written; None when it has not."""
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_results(folder: Path, stage: str, content: dict) -> None:
    """Write by temporary file and rename: a killed run leaves the last whole file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
