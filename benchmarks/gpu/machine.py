"""The machine: versions, sizes, measured ceilings, and the build in place."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata

import torch

from benchmarks.gpu.record import ROOT, Record
from benchmarks.gpu.timing import make_timer
from benchmarks.harness import interleaved


def output_of(*command: str, timeout: float = 120) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; 127 where it is not installed."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        return 127, f"{command[0]}: not installed"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: still running after {timeout:.0f} s"
    return done.returncode, done.stdout.strip()


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda_of_torch": torch.version.cuda}
    for package in ("triton", "flash-attn", "numpy", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    found["driver, max SM clock, power limit"] = output_of(*query)[1]
    found["nvcc"] = output_of("nvcc", "--version")[1].splitlines()[-1]
    found["compute-sanitizer"] = shutil.which("compute-sanitizer")
    return found


def ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """Copy bandwidth, GB/s read + written (2 GiB each way), and the bf16 matmul rate, TFLOP/s (8192^3, random data)."""
    elements, n = (1 << 31, 8192) if device.type == "cuda" else (1 << 12, 32)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    timings = interleaved(runs, repeats, timer=make_timer(device))
    return {
        "copy_GB_per_s": 2 * elements / timings["copy"].median / 1e6,
        "matmul_bf16_TFLOP_per_s": 2 * n**3 / timings["matmul"].median / 1e9,
    }


def environment(record: Record) -> str:
    device = record.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        record.facts["gpu"] = {name: getattr(properties, name, None) for name in names}
    record.facts["versions"] = versions()
    record.flush()
    record.add({"ceilings": ceilings(device, 5 if record.dry else 20)})
    if record.dry:
        return f"torch {torch.__version__}; ceilings measured on tiny sizes and thrown away"
    found = record.rows[0]["ceilings"]
    return f"copy {found['copy_GB_per_s']:.0f} GB/s, bf16 matmul {found['matmul_bf16_TFLOP_per_s']:.0f} TFLOP/s"


def build(record: Record) -> str:
    """The C++ extension in place with what is installed (in a dry run: the command only), then the doctor's report."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if record.dry:
        status, text = output_of(sys.executable, "setup.py", "--version")
        print(f"  would run: {' '.join(command[1:])}")
    else:
        status, text = output_of(*command, timeout=max(60.0, record.seconds_left))
    record.add({"command": command[1:], "exit_status": status, "output": text[-2000:]})
    if status:
        record.fail(f"{' '.join(command[1:])} exited {status}: {text[-300:]}")
    status, text = output_of(sys.executable, "-m", "ard_kernels.doctor")
    record.add({"command": ["-m", "ard_kernels.doctor"], "exit_status": status, "output": text})
    if status:
        record.fail(f"doctor exited {status}: {text[-300:]}")
    return "extension built, doctor ran" if not record.failures else "see failures"
