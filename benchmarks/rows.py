"""Result rows and files: every row says what was compared, every file where and when it ran."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import re
import subprocess
import traceback
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import ard_kernels
from benchmarks.gpu.log import Log
from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def row(
    op: str, shape: str, direction: str, timings: dict[str, Timing], ours: str, peers: list[str], target: float, **facts
) -> dict:
    """One result (schema.json): ours against the fastest of `peers`; `target` is the least ratio peer / ours that
    counts as done.

    Without a peer (all refused) there is no ratio, and the target is not met. `facts` are added, or replace entries.
    """
    best = min(peers, key=lambda name: timings[name].median, default=None)
    ratio = timings[best].median / timings[ours].median if best else None
    by_round = timings[best].over(timings[ours]).summary() if best else None
    return {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "direction": direction,
        "milliseconds": {name: timing.summary() for name, timing in timings.items()},
        "ours": ours,
        "best_peer": best,
        "ratio": ratio,
        "ratio_by_round": by_round,
        "target": target,
        "met": ratio is not None and ratio >= target,
        "refused": {},
        **facts,
    }


def is_comparison(row: dict) -> bool:
    """Whether a row of a result file was made by `row`; GPU stages that check or tune write others."""
    return "best_peer" in row


def relative_noise(row: dict) -> float:
    """Twice the standard error of the median of the ratios by round: 1.25 deviations / sqrt(n); p80 - p20 is 1.68."""
    spread = row["ratio_by_round"]
    deviation = (spread["p80"] - spread["p20"]) / 1.68
    return 2 * 1.25 * deviation / math.sqrt(spread["rounds"]) / spread["median"]


def row_key(row: dict) -> tuple[str, ...]:
    """What a row measures."""
    return row["op"], row["shape"], row["dtype"], row["direction"], row.get("backend", "")


def goal(what: str, value: float, target: float) -> dict:
    return {"what": what, "value": value, "target": target, "met": value >= target}


def verdict(target: dict) -> str:
    """met, or missed with how far: value / target."""
    met = "met" if target["met"] else f"missed: {target['value'] / target['target']:.3f} of it"
    return f"{target['value']:.3f} {target['what']} (target {target['target']:.3f}): {met}"


def describe(error: BaseException) -> str:
    """Type, message and the place of an error, on one line."""
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(place[-1].filename).name}:{place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"


def cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match.group(1) if match else platform.processor()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _git(*arguments: str) -> str:
    """Output of a git command; empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Output of a program; None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _driver() -> str:
    """Version of NVIDIA's driver; where there is no nvidia-smi, the newest CUDA it serves."""
    if asked := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        return asked
    cuda = ctypes.c_int()
    if status := ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(cuda)):
        raise RuntimeError(f"cuDriverGetVersion returned {status}; expected 0")
    return f"for CUDA {cuda.value // 1000}.{cuda.value % 1000 // 10}"


def environment(device: torch.device | None = None) -> dict:
    """Where a result comes from; `device` is where it ran, default this machine's best.

    A copy without its repository takes the commit from the variable ARD_COMMIT; whether it is dirty is unknown then.
    """
    commit = _git("rev-parse", "HEAD")
    dirty = bool(
        _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs", ":!README.md")
    )
    on_gpu = (device or best_device()).type == "cuda"
    nvcc = re.search(r"release [\d.]+, V([\d.]+)", _output("nvcc", "--version") or "")
    return {
        "date": date.today().isoformat(),
        "commit": commit or os.environ.get("ARD_COMMIT", "unknown"),
        "dirty": dirty if commit else None,
        "device": device_name(device),
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "nvcc": nvcc.group(1) if nvcc else None,
        "ard_kernels": ard_kernels.__version__,
    }


def best_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device | None = None) -> str:
    """In words."""
    device = device or best_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def results_folder() -> Path:
    """benchmarks/results/<device>: the GPU, or the CPU with its number of threads."""
    device = best_device()
    words = device_name(device) if device.type == "cuda" else f"{cpu_name()} {torch.get_num_threads()} threads"
    return RESULTS / slug(words)


def load_rooms(path: Path) -> dict[str, dict]:
    """Results by room, of a folder (each <room>.json, and every stage of the GPU check's log) or of one such file."""
    rooms = {}
    for file in (*sorted(path.glob("*.json")), path / Log.NAME) if path.is_dir() else (path,):
        if file.name == Log.NAME:
            stages = Log(file.parent).read()
            rooms |= {stage: found.content(stage) for stage, found in stages.items() if found.environment}
        else:
            rooms[file.stem] = json.loads(file.read_text())
    return rooms


def write_room(folder: Path, name: str, rows: list[dict], facts: dict, device: torch.device | None = None) -> Path:
    """folder/<name>.json, whole or not at all; the path, relative to the repository where it lies in it."""
    path, partial = folder / f"{name}.json", folder / f"{name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"environment": environment(device), "rows": rows, **facts}, indent=2) + "\n")
    os.replace(partial, path)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
