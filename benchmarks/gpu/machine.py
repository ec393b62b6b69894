"""`python -m benchmarks.gpu.machine environment|build FOLDER`: the machine's facts, and the build in place for it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from ard_kernels import doctor
from ard_kernels.common import findings
from ard_kernels.common.machine import version
from benchmarks.files import ROOT, write_json
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.processes import FAILED, find_tool, output_of
from benchmarks.results import environment
from benchmarks.timing import DEVICE, TINY, ceilings

PACKAGES = ("triton", "numpy", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "safetensors", "flash-attn")
# nvcc on a few cores; the extension without CUDA kernels takes a part of it.
BUILD_SECONDS, CPU_BUILD_SECONDS = 240.0, 90.0


def simulate() -> None:
    """Let Triton's interpreter and testing/emulator serve the GPU backends on CPU tensors, in this process.

    TRITON_INTERPRET=1 has to be set before. Without a C++ compiler or pybind11 there is no emulator: cuda is left out.
    """
    from ard_kernels.common import extension
    from testing import triton_interpreter

    triton_interpreter.repair()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or importlib.util.find_spec("pybind11") is None:
        print(f"backend cuda is left out: its emulator needs pybind11 and a C++ compiler ({compiler})", flush=True)
        return
    from testing import emulator

    extension.emulated = emulator.load()


def versions() -> dict[str, str | None]:
    found = {"cuda_of_torch": torch.version.cuda} | {package: version(package) or None for package in PACKAGES}
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    found["driver, max SM clock, power limit"] = output_of(*query)[1]
    return found | {"compute-sanitizer": find_tool("compute-sanitizer")}


def write_environment(folder: Path, resumed: bool) -> str:
    """FOLDER/environment.json; why this machine cannot go on with what it says already, empty when it can."""
    path, here = folder / "environment.json", environment(DEVICE) | {"dry_run": TINY}
    if resumed and path.is_file():
        there = json.loads(path.read_text())["environment"]
        different = [key for key in here if key != "date" and there.get(key) != here[key]]
        if different:
            said = ", ".join(f"{key} {there.get(key)}, here {here[key]}" for key in different)
            return f"--continue: it was run with {said}; a run without --continue begins anew"
    rates, gpu = ceilings(DEVICE, repeats=5 if TINY else 20), {}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        gpu = {name: getattr(properties, name, None) for name in names}
        print(f"copy {rates['GB/s']:.0f} GB/s, bf16 matmul {rates['TFLOP/s']:.0f} TFLOP/s")
    write_json(path, {"environment": here, "gpu": gpu, "versions": versions(), "ceilings": rates})
    return ""


def build_variables() -> dict[str, str]:
    """What setup.py needs: where nvcc is, CUDA is demanded, for this GPU alone (without one, for an H100 or H200)."""
    programs = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    found = {"PATH": programs}  # cmake and ninja of this Python come first
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return found | {"ARD_BUILD_CUDA": "0"}
    if not shutil.which("nvcc"):
        found["CUDA_HOME"] = str(Path(nvcc).parents[1])
    major, minor = torch.cuda.get_device_capability(DEVICE) if DEVICE.type == "cuda" else (9, 0)
    suffix = "a" if (major, minor) == (9, 0) else ""  # wgmma and TMA are in 90a only
    return found | {"ARD_BUILD_CUDA": "1", "ARD_CUDA_ARCHS": f"{major}{minor}{suffix}"}


def compiler_errors(text: str) -> str:
    """The end of a build's output from its first error on; all of its end when no line looks like one."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.search(r"\bFAILED:|\b[Ee]rror\b|\bfatal\b", line)), -20)
    return "\n".join(lines[begin:][:30])


def run_setup(journal: Journal, variables: dict[str, str], seconds: float) -> bool:
    """setup.py build_ext in place, under `variables`; whether it went well. A dry run asks for the version only."""
    said = " ".join(f"{name}={value}" for name, value in variables.items() if name.startswith("ARD_"))
    arguments = ["--version"] if TINY else ["build_ext", "--inplace"]
    with journal.piece(f"{said} setup.py {' '.join(arguments)}", seconds + 10) as entry:
        status, text = output_of(sys.executable, "setup.py", *arguments, timeout=seconds, environment=variables)
        entry["output"] = text[-4000:]
        if status:
            raise RuntimeError(f"exit status {status}:\n{compiler_errors(text)}")
    return status == 0


def build(journal: Journal) -> None:
    """The extension with CUDA kernels where nvcc is found, then the doctor's report.

    Where the kernels do not compile, the stage fails, and the extension is built without them: none of an earlier
    build are left, and the stages that follow check the other backends.
    """
    variables = build_variables()
    with_cuda = variables["ARD_BUILD_CUDA"] == "1"
    if not with_cuda:
        print("no nvcc on PATH, in CUDA_HOME or /usr/local/cuda: built without CUDA kernels, cuda is not checked")
    built = run_setup(journal, variables, BUILD_SECONDS)
    if not built and with_cuda:
        for stale in (ROOT / "ard_kernels").glob("_C*.so"):
            stale.unlink()
        run_setup(journal, variables | {"ARD_BUILD_CUDA": "0"}, CPU_BUILD_SECONDS)
    with journal.piece("doctor", 60.0) as entry:
        status, entry["output"] = output_of(sys.executable, "-m", "ard_kernels.doctor")
        print(entry["output"])
        if status:
            raise RuntimeError(f"exit status {status}: {entry['output'][-300:]}")
        if built and with_cuda and not TINY and "CUDA C++ kernels: built in" not in entry["output"]:
            raise RuntimeError("the extension that was built has no CUDA kernels")


def self_check(journal: Journal) -> None:
    """What `python -m ard_kernels.doctor --check` does, a line for each kind of call. A dry run checks one op."""
    print("self-check of every kernel")
    for row in doctor.check(["gelu"] if TINY else ()):
        what = " ".join(map(str, row[:5]))
        outcome = row.status if row.status in (findings.PASSED, findings.FAILED) else "skipped"
        journal.write(what=what, outcome=outcome, why=row.why, ratio=row.ratio, seconds=row.seconds)
        if outcome != "skipped":
            print(f"  {what}: {row.status} {row.why} {row.ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("what", choices=("environment", "build", "self_check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--continue", action="store_true", dest="resume")
    options = parser.parse_args()
    if options.what == "environment":
        sys.exit(write_environment(options.folder, options.resume) or 0)
    journal = Journal(options.folder / f"{options.what}.jsonl")
    {"build": build, "self_check": self_check}[options.what](journal)
    sys.exit(FAILED if journal.failures() else 0)


if __name__ == "__main__":
    main()
