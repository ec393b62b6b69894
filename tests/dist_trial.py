"""Tries an installed ard-kernels, from outside the repository; of `make dist`.

Without --command only torch and numpy are there; with it the extras of the command line, and it names `ard`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import ard
import torch

import ard_kernels


def check(fact: bool, what: object) -> None:
    if not fact:
        raise SystemExit(f"dist_trial: {what}")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


version = importlib.metadata.version("ard-kernels")
check(ard_kernels.__version__ == version, f"version {ard_kernels.__version__}, of its metadata {version}")
repository = Path(__file__).resolve().parents[1]
for package in (ard_kernels, ard):
    folder = Path(package.__file__).parent
    check("site-packages" in folder.parts, f"{folder} is not what was installed")
    check((folder / "py.typed").is_file(), f"{folder} has no py.typed")

# One C++ op on the CPU, several threads, against PyTorch.
torch.set_num_threads(2)
x, branch, gate = torch.randn(2, 64, 128), torch.randn(2, 64, 128), torch.randn(2, 4, 128)
ours, plain = (ard_kernels.gate_residual(x, branch, gate, segment_length=16, backend=name) for name in ("cpu", "torch"))
check(torch.allclose(ours, plain), "backends cpu and torch of gate_residual differ")
maps = Path("/proc/self/maps").read_text().splitlines()
runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
check(len(runtimes) == 1, f"OpenMP runtimes in one process: {sorted(runtimes)}; expected torch's alone")
check("torch" in runtimes.copy().pop(), f"the OpenMP runtime is {runtimes}; expected torch's")

if sys.argv[1:2] == ["--command"]:
    command = sys.argv[2]
    check(run(command, "--version").startswith(f"ard-kernels {version}, torch "), "ard --version")
    flops = json.loads(run(command, "flops", "--json"))
    check(flops["student_sampling"]["counted"] == 959843008512, f"ard flops --json: {flops}")
cuda = "with" if hasattr(ard_kernels.common.extension.module, "gpu") else "without"
tried = "op and command" if sys.argv[1:] else "op"
print(f"ard-kernels {version}, Python {sys.version.split()[0]}, {cuda} CUDA kernels: {tried} as expected")
