"""Training runs in a folder: made when first asked for, then compared by what they leave (checkpoints, log)."""

from __future__ import annotations

import json
from pathlib import Path

from ard.common.process import Process
from ard.storage.checkpoints import Checkpoint, newest
from fault_runs import read_log
from student.distributed_worker import STEPS, Case, run_case, tiny_store

GROUPS = ("model", "ema", "optimizer")
GAN_GROUPS = (*GROUPS, "discriminator", "discriminator_optimizer")
DOUBLE = {"dtype": "float64"}


def execution(**settings) -> Case:
    return {"execution": settings}


class Runs:
    """A folder with the store and a folder for each run. cases: what this process trains, on ``process``'s device."""

    def __init__(self, folder: Path, cases: dict[str, Case], process: Process | None = None):
        self.folder, self.cases, self.process = folder, cases, process or Process()
        sizes = next(iter(cases.values())).get("model", {})
        tiny_store(folder / "store", sizes.get("input_size", 4))

    def path(self, name: str) -> Path:
        if name in self.cases and not (self.folder / name).exists():
            run_case({"name": name} | self.cases[name], self.folder, self.process)
        return self.folder / name

    def checkpoint(self, name: str) -> Checkpoint:
        return newest(self.path(name) / "checkpoints")

    def seen(self, name: str, step: int = 0) -> list[dict]:
        """What each rank saw in the process that started at ``step``."""
        return [json.loads((self.path(name) / f"seen-{step}-{rank}.json").read_text()) for rank in (0, 1)]

    def order(self, name: str) -> list[list[int]]:
        """Sample ids of each step, from all ranks and all processes that had a part in the run."""
        rows = [row for path in self.path(name).glob("seen-*.json") for row in json.loads(path.read_text())["seen"]]
        steps = {step: [] for step in range(1 + max(step for step, _, _ in rows))}
        for step, _, ids in sorted(rows):
            steps[step] += ids
        return list(steps.values())

    def assert_same(self, name: str, other: str, bound: float = 0.0, groups: tuple[str, ...] = GROUPS) -> None:
        """Checkpoints and logs agree: weights and moments relative to the largest of their kind."""
        one, two = self.checkpoint(name), self.checkpoint(other)
        assert one.step == two.step == STEPS
        for group in groups:
            values, others = one.read(group), two.read(group)
            assert values.keys() == others.keys()
            scales: dict[str, float] = {}
            for key, value in others.items():
                scales[kind(group, key)] = max(scales.get(kind(group, key), 0.0), float(value.abs().max()))
            for key, value in values.items():
                assert (value - others[key]).abs().max() <= bound * scales[kind(group, key)], (group, key)
        log, other_log = read_log(self.path(name)), read_log(self.path(other))
        assert [line["step"] for line in log] == [line["step"] for line in other_log] == list(range(1, STEPS + 1))
        for line, other_line in zip(log, other_log, strict=True):
            assert line.keys() == other_line.keys()
            for key in line.keys() - {"samples_per_second"}:
                assert abs(line[key] - other_line[key]) <= bound * max(1.0, abs(other_line[key])), (line["step"], key)


def kind(group: str, key: str) -> str:
    """Moments of one order, or all weights."""
    return key.partition(".")[0] if "optimizer" in group else ""
