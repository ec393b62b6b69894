"""Result rows and files: every row says what was compared, every file where and when it ran."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import cache
from pathlib import Path

import torch

import ard_kernels
from ard_kernels.common import extension, machine
from ard_kernels.tune.timing import Timing
from benchmarks.files import RESULTS, ROOT
from benchmarks.timing import DEVICE

Summary = dict[str, float]  # median, p20, p80 and rounds, of Timing.summary


@dataclass(kw_only=True)
class Row:
    """One comparison: ours against the fastest alternative of the same run.

    milliseconds: by candidate, references (copy, matmul) among them. best_peer: the fastest; None: all were refused,
    and there is no ratio. ratio: its median / ours. ratio_by_round: that ratio within each round, whose spread is the
    noise of the comparison. target: the least ratio that counts as done. facts: what some rows have besides, such as
    backend, rate and unit, intensity (useful FLOPs per byte), ceiling, peak_bytes, targets (see `goal`).
    """

    op: str
    shape: str
    dtype: str = "float32"
    direction: str
    milliseconds: dict[str, Summary]
    ours: str
    best_peer: str | None
    ratio: float | None
    ratio_by_round: Summary | None
    target: float
    met: bool
    refused: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        for name, time in self.milliseconds.items():
            if time.keys() != {"median", "p20", "p80", "rounds"} or not time["median"] > 0:
                raise ValueError(f"Row {self.op} {self.shape}: the time of {name} is {time}")
        needed = {self.ours} | ({self.best_peer} if self.best_peer else set())
        if missing := needed - self.milliseconds.keys():
            raise ValueError(f"Row {self.op} {self.shape}: no time of {', '.join(missing)}")

    @classmethod
    def read(cls, entry: dict) -> Row:
        names = {each.name for each in fields(cls)}
        facts = {name: value for name, value in entry.items() if name not in names}
        return cls(**{name: value for name, value in entry.items() if name in names}, facts=facts)

    def entry(self) -> dict:
        """As a file has it."""
        own = asdict(self)
        return own | own.pop("facts")

    def time(self, candidate: str) -> float:
        return self.milliseconds[candidate]["median"]

    @property
    def key(self) -> tuple[str, ...]:
        """What it measures."""
        return self.op, self.shape, self.dtype, self.direction, self.facts.get("backend", "")

    @property
    def noise(self) -> float:
        """Twice the standard error of the median ratio by round: 1.25 deviations / sqrt(n); p80 - p20 is 1.68."""
        spread = self.ratio_by_round
        deviation = (spread["p80"] - spread["p20"]) / 1.68
        return 2 * 1.25 * deviation / math.sqrt(spread["rounds"]) / spread["median"]


def compared(timings: dict[str, Timing], ours: str, peers: list[str], target: float, **others) -> Row:
    """The row of `ours` against the fastest of `peers`; others: fields of Row, and facts."""
    if ours not in timings:
        raise RuntimeError(f"{ours} was not timed: {others.get('refused', {}).get(ours)}")
    best = min(peers, key=lambda name: timings[name].median, default=None)
    ratio = timings[best].median / timings[ours].median if best else None
    measured = {
        "milliseconds": {name: timing.summary() for name, timing in timings.items()},
        "ours": ours,
        "best_peer": best,
        "ratio": ratio,
        "ratio_by_round": timings[best].over(timings[ours]).summary() if best else None,
        "target": target,
        "met": ratio is not None and ratio >= target,
    }
    return Row.read(measured | others)


def goal(what: str, value: float, target: float) -> dict:
    return {"what": what, "value": value, "target": target, "met": value >= target}


def output(*command: str) -> str:
    """What a program says; empty where it is not installed or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def _driver() -> str:
    """Version of NVIDIA's driver; where there is no nvidia-smi, the newest CUDA it serves."""
    if asked := output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        return asked
    cuda = ctypes.c_int()
    if status := ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(cuda)):
        raise RuntimeError(f"cuDriverGetVersion returned {status}; expected 0")
    return f"for CUDA {cuda.value // 1000}.{cuda.value % 1000 // 10}"


@cache
def environment(device: torch.device = DEVICE) -> dict:
    """Where a result comes from; `device` is where it ran.

    A copy without its repository takes the commit from the variable ARD_COMMIT; whether it is dirty is unknown then.
    """
    commit = output("git", "rev-parse", "HEAD")
    ours = ("--", ":!benchmarks/results", ":!docs", ":!README.md")
    dirty = bool(output("git", "status", "--porcelain", "--untracked-files=no", *ours))
    nvcc = re.search(r"release [\d.]+, V([\d.]+)", output("nvcc", "--version"))
    return {
        "date": date.today().isoformat(),
        "commit": commit or os.environ.get("ARD_COMMIT", "unknown"),
        "dirty": dirty if commit else None,
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.triton_version() or None,
        "nvcc": nvcc.group(1) if nvcc else None,
        "ard_kernels": ard_kernels.__version__,
        "restrained": extension.restrained_isa() is not None,
    }


def device_name(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine.processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def results_folder() -> Path:
    """benchmarks/results/<device>: the GPU, or the CPU with its threads, and the instructions it has or was kept to."""
    words = device_name(DEVICE)
    if DEVICE.type == "cpu" and extension.restrained_isa() is not None:
        words += " restrained"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def load_rooms(path: Path) -> dict[str, dict]:
    """Result files by room, rows as `Row`: those of a folder, or one file."""
    rooms = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        content = json.loads(file.read_text())
        if "rows" in content:
            rooms[file.stem] = content | {"rows": [Row.read(entry) for entry in content["rows"]]}
    return rooms
