"""The machine: versions, sizes, measured ceilings, and the build in place."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from ard_kernels.common import extension
from ard_kernels.common.triton_support import INSTALLED
from benchmarks.gpu.log import Log
from benchmarks.gpu.record import ROOT, Record, run_environment
from benchmarks.timing import interleaved, make_timer

# nvcc on a few cores; the extension without CUDA kernels takes a part of it.
BUILD_SECONDS, CPU_BUILD_SECONDS = 240.0, 90.0


def refusal(device: torch.device, log: Log, stages: list[str], resumed: bool) -> str:
    """Why `stages` are not run on this machine; empty when they are."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU; expected one (--dry-run needs none)"
    if not resumed:
        return ""
    here = run_environment(device)
    for name, found in log.read().items():
        there = found.environment
        different = [key for key in here if key != "date" and key in there and there[key] != here[key]]
        if name in stages and different:
            said = ", ".join(f"{key} {there[key]}, here {here[key]}" for key in different)
            return f"--continue: the stage {name} was run with {said}; a run without --continue begins anew"
    if build_is_gone(log) and "build" not in stages:
        return "--continue: the CUDA kernels that were built are not on this machine; add build to --only"
    return ""


def build_is_gone(log: Log) -> bool:
    """Whether the build stage has made CUDA kernels that are not here."""
    build = log.read().get("build")
    made = build is not None and build.status == "passed" and build.facts.get("cuda_kernels", False)
    return made and not hasattr(extension.module, "gpu")


def output_of(*command: str, timeout: float = 40, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; 127 where it is not installed.

    `environment` is added to ours. Over its time, the command and what it started are ended.
    """
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, f"{command[0]}: not installed"
    try:
        text = child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return 124, f"{child.communicate()[0].strip()}\n{command[0]}: still running after {timeout:.0f} s"
    return child.returncode, text.strip()


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda_of_torch": torch.version.cuda}
    for package in ("triton", "flash-attn", "numpy", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    found["driver, max SM clock, power limit"] = output_of(*query)[1]
    nvcc = find_tool("nvcc")
    found["nvcc"] = output_of(nvcc, "--version")[1].splitlines()[-1] if nvcc else None
    found["compute-sanitizer"] = find_tool("compute-sanitizer")
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
    record.attempt("rates", lambda: record.add({"ceilings": ceilings(device, 5 if record.dry else 20)}))
    if record.dry:
        return f"torch {torch.__version__}; ceilings measured on tiny sizes and thrown away"
    if not record.rows:
        return "no ceilings measured"
    found = record.rows[0]["ceilings"]
    return f"copy {found['copy_GB_per_s']:.0f} GB/s, bf16 matmul {found['matmul_bf16_TFLOP_per_s']:.0f} TFLOP/s"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME or CUDA_PATH, beside nvcc, or where NVIDIA installs it."""
    roots = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    nvcc = shutil.which("nvcc")
    folders = [f"{root}/bin" for root in (*roots, "/usr/local/cuda")]
    folders += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return next(filter(None, (shutil.which(name, path=path) for path in (None, *folders))), None)


def repair_interpreter() -> None:
    """Of Triton, in this process, as the tests do."""
    if INSTALLED:
        from testing import triton_interpreter

        triton_interpreter.repair()


def load_emulator() -> str:
    """Let testing/emulator serve backend cuda on CPU tensors, in this process; why not, where it cannot be built."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"the emulator of the CUDA kernels needs a C++ compiler, and there is no {compiler}: cuda is left out"
    try:
        from testing import emulator
    except ImportError as error:  # pybind11
        return f"the emulator of the CUDA kernels is not usable: {error}: cuda is left out"
    extension.emulated = emulator.load()
    return ""


def build_environment(device: torch.device) -> dict[str, str]:
    """What setup.py needs: where nvcc is, CUDA is demanded, for this GPU alone (without one, for an H100 or H200)."""
    programs = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    found = {"PATH": programs}  # cmake and ninja of this Python come first
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return found | {"ARD_BUILD_CUDA": "0"}
    if not shutil.which("nvcc"):
        found["CUDA_HOME"] = str(Path(nvcc).parents[1])
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    suffix = "a" if (major, minor) == (9, 0) else ""  # wgmma and TMA are in 90a only
    return found | {"ARD_BUILD_CUDA": "1", "ARD_CUDA_ARCHS": f"{major}{minor}{suffix}"}


def compiler_errors(text: str) -> str:
    """The end of a build's output from its first error on; all of its end when no line looks like one."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.search(r"\bFAILED:|\b[Ee]rror\b|\bfatal\b", line)), -20)
    return "\n".join(lines[begin:][:30])


def run_build(record: Record, variables: dict[str, str], timeout: float) -> bool:
    """setup.py build_ext in place, under `variables`; whether it went well."""
    said = [f"{name}={value}" for name, value in variables.items() if name.startswith("ARD_")]
    command = ["setup.py", "build_ext", "--inplace"]
    print(f"  {'would run' if record.dry else 'running'}: {' '.join([*said, *command])}", flush=True)
    begin = time.monotonic()
    if record.dry:  # that setup.py can be run at all
        command = ["setup.py", "--version"]
    status, text = output_of(sys.executable, *command, timeout=timeout, environment=variables)
    seconds = round(time.monotonic() - begin, 1)
    record.add({"command": [*said, *command], "exit_status": status, "seconds": seconds, "output": text[-4000:]})
    if status:
        record.fail(f"{' '.join([*said, *command])} exited {status} after {seconds} s:\n{compiler_errors(text)}")
    elif not record.dry:
        print(f"  built in {seconds} s", flush=True)
    return status == 0


def build(record: Record) -> str:
    """The C++ extension in place, CUDA kernels for this GPU included where nvcc is found; then the doctor's report."""
    record.attempt("extension", lambda: make_extension(record), BUILD_SECONDS + CPU_BUILD_SECONDS + 10)
    record.attempt("doctor", lambda: ask_doctor(record))
    if record.dry:
        return "nothing built; doctor ran"
    built = [row for row in record.rows if "seconds" in row]
    with_cuda = record.facts["cuda_kernels"] = bool(built) and "ARD_BUILD_CUDA=1" in built[-1]["command"]
    seconds = sum(row["seconds"] for row in built)
    return f"extension {'with' if with_cuda else 'without'} CUDA kernels, {seconds:.0f} s; doctor ran"


def make_extension(record: Record) -> None:
    """Where the CUDA kernels do not compile, the stage fails, and the extension is built without them: no kernels of an
    earlier build are left, and the stages that follow check the other backends.
    """
    variables = build_environment(record.device)
    with_cuda = variables["ARD_BUILD_CUDA"] == "1"
    if not with_cuda:
        print("  no nvcc on PATH, in CUDA_HOME or /usr/local/cuda: built without CUDA kernels, cuda is not checked")
    if not run_build(record, variables, BUILD_SECONDS) and with_cuda:
        for stale in (ROOT / "ard_kernels").glob("_C*.so"):
            stale.unlink()
        run_build(record, variables | {"ARD_BUILD_CUDA": "0"}, CPU_BUILD_SECONDS)


def ask_doctor(record: Record) -> None:
    """What it says goes into the results; kernels that were built must be there."""
    status, text = output_of(sys.executable, "-m", "ard_kernels.doctor")
    record.add({"command": ["-m", "ard_kernels.doctor"], "exit_status": status, "output": text})
    if status:
        record.fail(f"doctor exited {status}: {text[-300:]}")
    built = [row["command"] for row in record.rows if "seconds" in row and row["exit_status"] == 0]
    if not record.dry and built and "ARD_BUILD_CUDA=1" in built[-1] and "CUDA C++ kernels: built in" not in text:
        record.fail(f"the extension that was built has no CUDA kernels: {text[:300]}")
