"""The CUDA C++ kernels on the host: csrc compiled with the C++ compiler against emulator.h, as a Python module."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
# -O1: -O2 costs twice the compile time and saves a tenth of the run time.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}", f"-I{pybind11.get_include()}", "-DARD_CUDA_SM90"]
FLAGS += [f"-I{sysconfig.get_path('include')}"]


def head_dims() -> list[str]:
    """What CMakeLists.txt compiles the attention kernels for."""
    return re.search(r"^set\(ARD_HEAD_DIMS ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)[1].split()


def _units() -> list[str]:
    """Text of each translation unit: all bindings, and each kernel source, with all head dims where it has one.

    Most of the time goes into headers and the emulator: a unit per binding and head dim took 2.3 times as long.
    """
    bindings = [*sorted(CSRC.glob("*/gpu_bindings.cpp")), HERE / "module.cpp"]
    units = [f"#define ARD_HEAD_DIMS {','.join(head_dims())}\n" + "".join(f'#include "{path}"\n' for path in bindings)]
    for path in sorted(CSRC.glob("*/*.cu")):
        dims = head_dims() if path.parent.name == "block_causal_attention" else [""]
        units.append("".join(f'#define ARD_HEAD_DIM {dim}\n#include "{path}"\n#undef ARD_HEAD_DIM\n' for dim in dims))
    return units


def _build(library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=BUILD) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiler, linked = os.environ.get("CXX", "g++"), f"{folder}/ard_emulated.so"

        def compile_unit(number: int, text: str) -> str:
            source = Path(folder, f"unit{number}.cpp")
            source.write_text(text)
            subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", f"{source}.o"], check=True)
            return f"{source}.o"

        objects = list(pool.map(compile_unit, *zip(*enumerate(_units()), strict=True)))
        subprocess.run([compiler, "-shared", *objects, "-o", linked], check=True)
        Path(linked).rename(library)


def load() -> ModuleType:
    """Import the module; build it first if none of these very sources is there. One process builds, others wait."""
    BUILD.mkdir(parents=True, exist_ok=True)
    files = [
        path for folder in (CSRC, HERE) for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")
    ]
    digest = hashlib.sha256(repr((FLAGS, _units(), [path.read_bytes() for path in files])).encode()).hexdigest()[:16]
    library = BUILD / f"ard_emulated-{digest}.so"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    spec = importlib.util.spec_from_file_location("ard_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
