"""`python -m benchmarks.gpu.fastest FOLDER`: which of our GPU backends the library chooses by itself.

Writes ard_kernels/tuned/fastest.json from what one run of `make gpu-check` left in FOLDER. A backend is listed for a
shape class when it was measured the fastest of ours there (forward + backward together; history attention has the
forward alone), the op's tests passed with it on the GPU, bit-equal repeats among them, and so did compute-sanitizer.
Entries of other architectures stay as they are.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch

from ard_kernels.common import tuning
from benchmarks.files import ROOT, write_json
from benchmarks.gpu.journal import Journal
from benchmarks.results import Row, load_rooms
from testing.cases import ADALN

TABLE = tuning.SHIPPED / "fastest.json"
# Tools of compute-sanitizer that must have passed; those beyond them must not have failed.
TOOLS = {"memcheck", "racecheck", "initcheck"}


def compare_backends(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds of each backend by shape class, geometric mean over the shapes that all backends there ran.

    A shape of which a direction is missing does not count; of a backend that lacks a shape which another ran nothing
    can be said.
    """
    times = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        backend, op = row.facts["backend"], row.facts["registered_op"]
        name = tuning.shape_class(op, getattr(torch, row.dtype), row.facts["width"])
        times[name][row.shape][backend][row.direction] = row.time(backend)
    found = {}
    for name, shapes in times.items():
        needed = {"forward"} if name.startswith("history_attention/") else {"forward", "backward"}
        whole = [
            {backend: sum(ways.values()) for backend, ways in shape.items() if ways.keys() == needed}
            for shape in shapes.values()
            if needed <= set().union(*shape.values())
        ]
        backends = [b for b in sorted({b for shape in whole for b in shape}) if all(b in shape for shape in whole)]
        found[name] = {b: math.exp(sum(math.log(shape[b]) for shape in whole) / len(whole)) for b in backends}
    return found


def doubts(op: str, backend: str, tests: list[dict], sanitizer: list[dict]) -> list[str]:
    """Why `backend` is not shown to be right for `op`; empty when it is."""
    room = "segment_adaln" if op in ADALN else op
    ran = [entry for entry in tests if f"tests/{room}/" in entry["what"] and f"{backend}-on-cuda" in entry["what"]]
    found = [f"failed: {entry['what']}" for entry in ran if entry["outcome"] == "failed"]
    passed = [entry["what"] for entry in ran if entry["outcome"] == "passed"]
    if not any("parity" in what or "history" in what for what in passed):
        found.append("no test of its values passed on the GPU")
    if not any("bit_equal" in what for what in passed):
        found.append("no test of bit-equal repeats passed on the GPU")
    watched = [entry for entry in sanitizer if entry.get("backend") == backend]
    found += [f"compute-sanitizer: {entry['tool']} failed" for entry in watched if entry["outcome"] == "failed"]
    passing = {entry["tool"] for entry in watched if entry["outcome"] == "passed" and op in entry["ops"]}
    return found + [f"compute-sanitizer: no result of {tool}" for tool in sorted(TOOLS - passing)]


def choose(folder: Path) -> tuple[dict[str, str], list[str]]:
    """{shape class: backend}, and a line for each class that says why."""
    here = json.loads((folder / "environment.json").read_text())["environment"]
    rooms = {name: room for name, room in load_rooms(folder).items() if any("backend" in r.facts for r in room["rows"])}
    if here["dry_run"] or not rooms:
        sys.exit(f"{folder}: expected the kernels' results of `make gpu-check`, and not of a dry run")
    for name, room in rooms.items():
        for key in ("device", "commit"):
            if room["environment"][key] != here[key]:
                sys.exit(f"{folder}: {name} is of {key} {room['environment'][key]}, the tests of {here[key]}")
    tests = [entry for path in sorted(folder.glob("values_*.jsonl")) for entry in Journal(path).results()]
    sanitizer = Journal(folder / "sanitizer.jsonl").results()
    chosen, lines = {}, []
    for name, times in sorted(compare_backends([row for room in rooms.values() for row in room["rows"]]).items()):
        against = {backend: doubts(name.split("/")[0], backend, tests, sanitizer) for backend in times}
        if right := [backend for backend in times if not against[backend]]:
            chosen[name] = min(right, key=times.get)
        words = [f"{backend} {time:.4f} ms" for backend, time in times.items()]
        words += [f"{backend} not chosen: {'; '.join(why[:3])}" for backend, why in against.items() if why]
        lines.append(f"{name}: {chosen.get(name, 'none')} ({', '.join(words)})")
    return chosen, lines


def update(folder: Path, table: Path) -> None:
    """Put what `folder` shows into `table`, in place of what it had for that architecture."""
    chosen, lines = choose(folder)
    gpu = json.loads((folder / "environment.json").read_text())["gpu"]
    architecture, content, source = f"sm{gpu['major']}{gpu['minor']}", json.loads(table.read_text()), folder.resolve()
    content["sources"][architecture] = str(source.relative_to(ROOT) if source.is_relative_to(ROOT) else source)
    content["backends"][architecture] = chosen
    write_json(table, content)
    print("\n".join([*lines, f"wrote {table}"]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m benchmarks.gpu.fastest FOLDER\n{__doc__}")
    update(Path(sys.argv[1]), TABLE)
