"""Builds ard_kernels._C with CMake and Ninja. Needs neither torch nor CUDA.

Environment:
    ARD_BUILD_CUDA  auto (default): CUDA kernels when a working nvcc 12.5 or newer is found in CUDA_HOME, CUDA_PATH or
                    PATH; 1: fail without one; 0: never. No GPU is needed to build.
    ARD_CUDA_ARCHS  architectures of the CUDA kernels, default "80;90a". The lowest one is built as PTX too, from which
                    the driver compiles for newer chips; the Hopper kernels need 90a in the list.
    ARD_SANITIZE    1: build the C++ code with AddressSanitizer and UndefinedBehaviorSanitizer, without CUDA.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("ARD_SANITIZE") == "1"


def find_nvcc():
    """Path of nvcc from CUDA_HOME, CUDA_PATH or PATH; None without a CUDA toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
            if candidate:
                return candidate
    return shutil.which("nvcc")


def cuda_architectures():
    """ARD_CUDA_ARCHS as a list such as ["80", "90a"]."""
    text = os.environ.get("ARD_CUDA_ARCHS") or "80;90a"
    architectures = re.split(r"[;,\s]+", text.strip())
    for name in architectures:
        match = re.fullmatch(r"(\d+)[af]?", name)
        if match is None or int(match[1]) < 80:
            sys.exit(f"ARD_CUDA_ARCHS is {text!r}; expected architectures from 80 on, such as '80;90a'")
    return architectures


def nvcc_problem(nvcc, architectures):
    """Why this nvcc cannot build the kernels, in one line; None when it compiles and links an empty one."""
    if nvcc is None:
        return "needs nvcc, and none is on PATH or in CUDA_HOME; install the CUDA toolkit or use 0"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n")
        command = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
        command += [str(source), "-o", f"{source}.so"]
        command += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        if os.environ.get("CUDAHOSTCXX"):
            command.append(f"-ccbin={os.environ['CUDAHOSTCXX']}")
        try:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
            release = re.search(r"release (\d+)\.(\d+)", version.stdout)
            if release is None:
                return f"{nvcc} --version says nothing of a release: {_first_line(version.stdout + version.stderr)}"
            if (int(release[1]), int(release[2])) < (12, 5):  # cudaGetDriverEntryPointByVersion
                return f"{nvcc} is of CUDA {release[1]}.{release[2]}; 12.5 or newer is needed"
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{nvcc} does not run: {error.strerror}"
    if probe.returncode:
        return f"{nvcc} cannot compile an empty kernel for {', '.join(architectures)}: {_first_line(probe.stderr)}"
    return None


def _first_line(text):
    return next((line.strip() for line in text.splitlines() if line.strip()), "no output")


def cuda_compiler(architectures):
    """The nvcc to build with, or None: as ARD_BUILD_CUDA says. Exits when CUDA is demanded and cannot be built."""
    choice = os.environ.get("ARD_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ARD_BUILD_CUDA is {choice!r}; expected auto, 0 or 1")
    if choice == "1" and SANITIZE:
        sys.exit("ARD_BUILD_CUDA=1 with ARD_SANITIZE=1: sanitizer builds have no CUDA kernels; use one of them")
    if choice == "0" or SANITIZE:
        return None
    nvcc = find_nvcc()
    problem = nvcc_problem(nvcc, architectures)
    if problem and choice == "1":
        sys.exit(f"ARD_BUILD_CUDA=1 {problem}" if nvcc is None else f"ARD_BUILD_CUDA=1: {problem}")
    if problem and nvcc:
        print(f"ard-kernels: building without CUDA kernels: {problem}", file=sys.stderr)
    return None if problem else nvcc


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt names."""

    def __init__(self, name):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, build with Ninja, and install the module where setuptools wants it."""

    def build_extension(self, ext):
        architectures = cuda_architectures()
        nvcc = cuda_compiler(architectures)
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # In words: the one of an earlier build may have gone with pip's isolated environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DARD_SANITIZE={'ON' if SANITIZE else 'OFF'}",
            f"-DARD_BUILD_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DARD_CUDA_ARCHS={';'.join(architectures)}"]
        install = ["cmake", "--install", str(build), "--prefix", str(target)]
        for command in (configure, ["cmake", "--build", str(build)], install):
            if status := subprocess.run(command).returncode:
                sys.exit(f"ard-kernels: {' '.join(command[:3])} failed with status {status}; its messages stand above")


packages = find_packages(include=["ard_kernels", "ard_kernels.*"]) + find_packages("python", include=["ard", "ard.*"])
setup(
    packages=packages,
    package_dir={"ard_kernels": "ard_kernels", "ard": "python/ard"},
    ext_modules=[CMakeExtension("ard_kernels._C")],
    cmdclass={"build_ext": CMakeBuild},
)
