"""The CUDA C++ kernels on the host: csrc compiled with the C++ compiler against emulator.h, as a Python module."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "emulator"
# -O1: -O2 costs twice the compile time and saves a tenth of the run time.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}", f"-I{pybind11.get_include()}", "-DARD_CUDA_SM90"]
FLAGS += [f"-I{sysconfig.get_path('include')}"]


def _sources() -> list[Path]:
    return [*sorted(CSRC.glob("*/*.cu")), *sorted(CSRC.glob("*/gpu_bindings.cpp")), HERE / "module.cpp"]


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths) + repr(FLAGS).encode()).hexdigest()[:16]


def _compile(source: Path, headers: list[Path]) -> Path:
    object_file = BUILD / f"{source.parent.name}-{source.stem}-{_digest(source, *headers)}.o"
    if not object_file.exists():
        partial = object_file.with_suffix(f".{os.getpid()}.tmp")
        command = [os.environ.get("CXX", "g++"), *FLAGS, "-x", "c++", "-c", str(source), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(object_file)
    return object_file


def load() -> ModuleType:
    """Build what changed since the last call (objects are named by their content) and import it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, headers), _sources()))
    library = BUILD / f"ard_emulated-{_digest(*objects)}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(partial)], check=True)
        partial.rename(library)
    spec = importlib.util.spec_from_file_location("ard_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
