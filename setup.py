"""Builds ard_kernels._C with CMake and Ninja. Needs neither torch nor CUDA.

Environment:
    ARD_BUILD_CUDA  auto (default): CUDA kernels when nvcc is found; 1: fail without nvcc; 0: never.
    ARD_SANITIZE    1: build the C++ code with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc():
    """Path of nvcc from CUDA_HOME, CUDA_PATH or PATH; None without a CUDA toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
            if candidate:
                return candidate
    return shutil.which("nvcc")


def check_build_cuda():
    """Read ARD_BUILD_CUDA; stop with a clear message when CUDA is demanded and cannot be built."""
    choice = os.environ.get("ARD_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ARD_BUILD_CUDA is {choice!r}; expected auto, 0 or 1")
    if choice != "1":
        return
    if find_nvcc() is None:
        sys.exit("ARD_BUILD_CUDA=1 needs nvcc, and none is on PATH or in CUDA_HOME; install the CUDA toolkit or use 0")
    sys.exit("ARD_BUILD_CUDA=1: this release has no CUDA kernels to build yet; use auto or 0")


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt names."""

    def __init__(self, name):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, build with Ninja, and install the module where setuptools wants it."""

    def build_extension(self, ext):
        check_build_cuda()
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
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DARD_SANITIZE={'ON' if os.environ.get('ARD_SANITIZE') == '1' else 'OFF'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


packages = find_packages(include=["ard_kernels", "ard_kernels.*"]) + find_packages("python", include=["ard", "ard.*"])
setup(
    packages=packages,
    package_dir={"ard_kernels": "ard_kernels", "ard": "python/ard"},
    ext_modules=[CMakeExtension("ard_kernels._C")],
    cmdclass={"build_ext": CMakeBuild},
)
