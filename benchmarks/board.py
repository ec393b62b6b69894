"""What a run of `pytest benchmarks` has measured: comparisons by room, and the files made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.measure import Measurement
from benchmarks.rows import describe, write_room


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates that are timed in turns. `measure` is called once, when the first of them is asked for."""

    label: str
    names: tuple[str, ...]
    measure: Callable[[], Measurement]


@dataclass
class Room:
    """Results of one bench_*.py file: rows (schema.json), and facts that are no times."""

    groups: dict[Group, Measurement | str] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    device: torch.device | None = None  # where it ran; None: this machine's best
    incomplete: str = ""  # why its file is not written

    @property
    def rows(self) -> list[dict]:
        return [row for found in self.groups.values() if isinstance(found, Measurement) for row in found.rows]


class Board:
    def __init__(self, folder: Path):
        self.folder = folder
        self.rooms: dict[str, Room] = {}

    def room(self, path: Path) -> Room:
        return self.rooms.setdefault(path.stem.removeprefix("bench_"), Room())

    def result(self, room: Room, group: Group) -> Measurement:
        """The measurement of `group`, made when it is not there yet; it fails for every candidate alike."""
        if group not in room.groups:
            try:
                room.groups[group] = group.measure()
            except Exception as error:
                room.groups[group] = describe(error)
        found = room.groups[group]
        if isinstance(found, str):
            raise RuntimeError(f"{group.label}: {found}")
        return found

    def write(self) -> list[str]:
        """Files of the rooms that ran whole; a line for each room."""
        lines = []
        for name, room in self.rooms.items():
            if room.incomplete:
                lines.append(f"{name}: {room.incomplete}, its results file stays as it was")
            else:
                lines.append(f"wrote {write_room(self.folder, name, room.rows, room.facts, room.device)}")
        return lines
