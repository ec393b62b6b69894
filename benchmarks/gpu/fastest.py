"""`python -m benchmarks.gpu.fastest RESULTS_FOLDER`: which of our GPU backends the library chooses by itself.

Writes ard_kernels/tuned/fastest.json from what one run of `make gpu-check` left in the folder. A backend is listed for
a shape class when it was measured the fastest of ours there, and correctness, determinism and compute-sanitizer have
shown it to be right. Entries of other architectures stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch

from ard_kernels.common import tuning
from ard_kernels.common.tuning import shape_class
from benchmarks.gpu.record import ROOT
from benchmarks.rows import load_rooms

TABLE = tuning.SHIPPED / "fastest.json"
# Tools of compute-sanitizer that must have passed; those beyond them must not have failed.
TOOLS = {"memcheck", "racecheck", "initcheck"}


def class_of(op: str, row: dict) -> str:
    return shape_class(op, getattr(torch, row["dtype"]), row["width"])


def compare_backends(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Milliseconds of each backend by shape class, geometric mean over the shapes that all backends there ran.

    Of a shape, forward + backward count together (history attention has the forward alone); one of them is not enough.
    """
    times = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        shape = times[class_of(row["registered_op"], row)][row["shape"]]
        shape.setdefault(row["backend"], {})[row["direction"]] = row["milliseconds"][row["backend"]]["median"]
    found = {}
    for name, shapes in times.items():
        needed = {"forward"} if name.startswith("history_attention/") else {"forward", "backward"}
        whole = [
            {backend: sum(ways.values()) for backend, ways in shape.items() if ways.keys() == needed}
            for shape in shapes.values()
            if needed <= set().union(*shape.values())
        ]
        # Of a backend that lacks a shape which another one ran nothing can be said.
        backends = [b for b in sorted({b for shape in whole for b in shape}) if all(b in shape for shape in whole)]
        found[name] = {b: math.exp(sum(math.log(shape[b]) for shape in whole) / len(whole)) for b in backends}
    return found


def faster_words(milliseconds: dict[str, float]) -> str:
    """The fastest backend, and by how much."""
    if not milliseconds:
        return "no backend ran all shapes in all directions"
    first, *others = sorted(milliseconds, key=milliseconds.get)
    against = [f"{milliseconds[other] / milliseconds[first]:.3f} x {other}" for other in others]
    return f"{first} {milliseconds[first]:.4f} ms, {' and '.join(against) or 'alone'}"


def correct(name: str, backend: str, checks: list[dict]) -> str:
    """Why results do not show `backend` to be right in the shape class `name`; empty when they do."""
    ran = [r for c in checks for r in c["rows"] if r.get("backend") == backend and class_of(r["op"], r) == name]
    if any("failed" in row for row in ran):
        return "wrong or broken in the correctness stage"
    if not any("ratios" in row for row in ran):
        return "no case of it ran in the correctness stage"
    return ""


def deterministic(op: str, backend: str, determinism: dict | None) -> str:
    ran = [r for r in (determinism or {"rows": []})["rows"] if (r["op"], r["backend"]) == (op, backend)]
    if not ran:
        return "no result of the determinism stage"
    return "not bit-equal over runs" if any(row["differing"] for row in ran) else ""


def sanitized(op: str, backend: str, sanitizer: dict | None) -> str:
    ran = [row for row in (sanitizer or {"rows": []})["rows"] if row["backend"] == backend]
    failed = [row["tool"] for row in ran if not row["passed"]]
    if failed:
        return f"compute-sanitizer: {', '.join(failed)} failed"
    missing = TOOLS - {row["tool"] for row in ran if op in row["ops"]}
    return f"compute-sanitizer: no result of {', '.join(sorted(missing))}" if missing else ""


def read(folder: Path) -> dict[str, dict | None]:
    """Results by stage; exits where they are not of one GPU, one state of the code, and a whole run."""
    stages = ("correctness", "correctness_tuned", "determinism", "sanitizer", "kernels")
    rooms = load_rooms(folder)
    found = {stage: rooms.get(stage) for stage in stages}
    for stage in ("correctness", "kernels"):
        if found[stage] is None:
            sys.exit(f"{folder}: no stage {stage}; expected the results of `make gpu-check`")
    for key in ("architecture", "device", "commit", "dry_run"):
        values = {stage: result["environment"][key] for stage, result in found.items() if result}
        if len(set(values.values())) > 1:
            sys.exit(f"{folder}: the stages differ in {key}: {values}")
    if found["kernels"]["environment"]["dry_run"]:
        sys.exit(f"{folder}: of a dry run, whose times mean nothing")
    return found


def choose(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """(architecture, {shape class: backend}, a line for each class that says why)."""
    found = read(folder)
    checks = [found[stage] for stage in ("correctness", "correctness_tuned") if found[stage]]
    chosen, lines = {}, []
    for name, milliseconds in sorted(compare_backends(found["kernels"]["rows"]).items()):
        op, against = name.split("/")[0], {}
        for backend in milliseconds:
            reasons = (
                correct(name, backend, checks),
                deterministic(op, backend, found["determinism"]),
                sanitized(op, backend, found["sanitizer"]),
            )
            against[backend] = "; ".join(filter(None, reasons))
        right = {backend: t for backend, t in milliseconds.items() if not against[backend]}
        if right:
            chosen[name] = min(right, key=right.get)
        words = [f"{backend} not chosen: {reason}" for backend, reason in against.items() if reason]
        lines.append(f"{name}: {chosen.get(name, 'none')} ({'; '.join([faster_words(milliseconds), *words])})")
    return found["kernels"]["environment"]["architecture"], chosen, lines


def update(folder: Path, table: Path = TABLE) -> list[str]:
    """Put what `folder` shows into `table`, in place of what it had for that architecture; the lines that say why."""
    architecture, chosen, lines = choose(folder)
    content = json.loads(table.read_text())
    source = folder.resolve()
    content["sources"][architecture] = str(source.relative_to(ROOT) if source.is_relative_to(ROOT) else source)
    content["backends"][architecture] = chosen
    partial = table.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, table)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.fastest", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="results of `make gpu-check`, benchmarks/results/<device>")
    parser.add_argument("--table", type=Path, default=TABLE, help="file to update; default the library's")
    options = parser.parse_args(arguments)
    print("\n".join(update(options.folder, options.table)))
    print(f"wrote {options.table}")


if __name__ == "__main__":
    main()
