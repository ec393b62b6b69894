"""`python -m benchmarks.gpu.fastest FOLDER`: where the library chooses another backend than Triton by itself.

Writes ard_kernels/tuned/fastest.json from what one run of `make gpu-check` left in FOLDER: the fastest of our backends
for each shape class (forward + backward together; history attention has the forward alone), flash among them where a
package is installed, if every test of values and compute-sanitizer passed. Entries of other architectures stay as they
are.
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
from benchmarks.results import Row, load_rooms

TABLE = tuning.SHIPPED / "fastest.json"
MUST_PASS = ("values_triton", "values_cuda", "values_rest", "self_check", "values_tuned", "sanitizer")


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


def choose(folder: Path) -> dict[str, str]:
    """{shape class: backend}; exits where the results do not show that all are right, or are not of one run."""
    stages = json.loads((folder / "gpu_check.json").read_text())
    if left := [name for name in MUST_PASS if stages.get(name, {}).get("status") != "passed"]:
        sys.exit(f"{folder}: {', '.join(left)} did not pass; expected a whole run of `make gpu-check`")
    here = json.loads((folder / "environment.json").read_text())["environment"]
    rooms = {name: room for name, room in load_rooms(folder).items() if any("backend" in r.facts for r in room["rows"])}
    if here["dry_run"] or not rooms:
        sys.exit(f"{folder}: expected the kernels' times of `make gpu-check`, and not of a dry run")
    for name, room in rooms.items():
        for key in ("device", "commit"):
            if room["environment"][key] != here[key]:
                sys.exit(f"{folder}: {name} is of {key} {room['environment'][key]}, the tests of {here[key]}")
    chosen = {}
    for name, times in sorted(compare_backends([row for room in rooms.values() for row in room["rows"]]).items()):
        if times:
            chosen[name] = min(times, key=times.get)
        print(f"{name}: {', '.join(f'{backend} {time:.4f} ms' for backend, time in times.items()) or 'not compared'}")
    return chosen


def update(folder: Path, table: Path) -> None:
    """Put what `folder` shows into `table`, in place of what it had for that architecture."""
    chosen, content, source = choose(folder), json.loads(table.read_text()), folder.resolve()
    gpu = json.loads((folder / "environment.json").read_text())["gpu"]
    architecture = f"sm{gpu['major']}{gpu['minor']}"
    content["sources"][architecture] = str(source.relative_to(ROOT) if source.is_relative_to(ROOT) else source)
    content["backends"][architecture] = chosen
    write_json(table, content)
    print(f"wrote {table}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m benchmarks.gpu.fastest FOLDER\n{__doc__}")
    update(Path(sys.argv[1]), TABLE)
