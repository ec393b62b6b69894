"""What a user gets from the package itself: light imports, the doctor, the build's environment variables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


def test_import_needs_only_torch_and_numpy():
    """Every other package of the environment is made unimportable; what torch itself loads is let be."""
    code = """
import sys, time, torch, numpy, torch.utils.flop_counter
before = set(sys.modules)
for name in ("typer", "rich", "yaml", "safetensors", "sklearn", "scipy", "matplotlib", "hypothesis", "pytest", "ard"):
    sys.modules[name] = None
start = time.perf_counter()
import ard_kernels
print(time.perf_counter() - start)
allowed = {"ard_kernels", "torch", "numpy"} | set(sys.stdlib_module_names)
print({name.split(".")[0] for name in set(sys.modules) - before if sys.modules[name] is not None} - allowed)
"""
    status, output = run_python("-c", code)
    assert status == 0, output
    seconds, foreign = output.strip().splitlines()
    assert foreign == "set()"
    assert float(seconds) < 0.3


def test_only_the_digits_need_scikit_learn():
    code = """
import importlib, pkgutil, sys
sys.modules["sklearn"] = None
import ard
for module in pkgutil.iter_modules(ard.__path__, "ard."):
    importlib.import_module(module.name)
ard.features.load_features("pooled")
try:
    ard.digits.load()
except ModuleNotFoundError as error:
    print(error.name)
"""
    status, output = run_python("-c", code)
    assert status == 0, output
    assert output.split() == ["sklearn.datasets"]


@pytest.mark.parametrize("name", ["ard_kernels.doctor", "ard"])
def test_doctor(name):
    status, output = run_python("-m", name, *(["doctor"] if name == "ard" else []))
    assert status == 0, output
    for word in ("torch ", "extension: ard_kernels._C", "gate_residual_adaln", "refused: ", "available"):
        assert word in output


def run_setup(folder, **environment):
    """The build with nothing on PATH but `folder`, so that it ends where cmake would be called at the latest."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    defaults = {"PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": "", "ARD_SANITIZE": "0", "ARD_CUDA_ARCHS": ""}
    status, output = run_python(*arguments, **defaults | environment)
    assert status != 0
    return output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ARD_BUILD_CUDA": "1"}, "ARD_BUILD_CUDA=1 needs nvcc, and none is on PATH"),
        ({"ARD_BUILD_CUDA": "yes"}, "ARD_BUILD_CUDA is 'yes'; expected auto, 0 or 1"),
        ({"ARD_BUILD_CUDA": "1", "ARD_SANITIZE": "1"}, "sanitizer builds have no CUDA kernels"),
        ({"ARD_CUDA_ARCHS": "80;sm_90"}, "ARD_CUDA_ARCHS is '80;sm_90'; expected architectures from 80 on"),
        ({"ARD_CUDA_ARCHS": "75"}, "ARD_CUDA_ARCHS is '75'; expected architectures from 80 on"),
    ],
)
def test_build_cuda_is_read(environment, message, tmp_path):
    assert message in run_setup(tmp_path, **environment)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo Cuda compilation tools, release 11.8, V11.8.89", "is of CUDA 11.8; 12.5 or newer is needed"),
        ("echo no such licence >&2; exit 1", "nvcc --version says nothing of a release: no such licence"),
        (
            '[ "$1" = --version ] && echo release 12.8 && exit 0; echo unsupported GNU version >&2; exit 1',
            "nvcc cannot compile an empty kernel for 80, 90a: unsupported GNU version",
        ),
    ],
)
def test_a_compiler_that_cannot_build_is_named(script, problem, tmp_path):
    """auto says so in one line and goes on without CUDA; 1 fails with the reason; 0 does not look."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    said = "ard-kernels: building without CUDA kernels: "
    (line,) = (line for line in run_setup(tmp_path, ARD_BUILD_CUDA="auto").splitlines() if line.startswith(said))
    assert problem in line
    output = run_setup(tmp_path, ARD_BUILD_CUDA="1")
    assert "ARD_BUILD_CUDA=1: " in output and problem in output and said not in output
    assert problem not in run_setup(tmp_path, ARD_BUILD_CUDA="0")


def test_backend_from_the_environment():
    code = "import torch, ard_kernels as k; x = torch.randn(1, 2, 8); k.gate_residual(x, x, x, segment_length=1)"
    assert run_python("-c", code, ARD_BACKEND="torch")[0] == 0
    status, output = run_python("-c", code, ARD_BACKEND="triton", TRITON_INTERPRET="0")
    assert status != 0 and "'triton' (environment ARD_BACKEND) cannot run" in output


def test_without_another_python_its_job_says_that_it_is_skipped():
    command = ["make", "test-other-python", "OTHER_PYTHON="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SKIPPED test-other-python: no Python 3.12" in done.stderr
    assert "make test-other-python" in (ROOT / ".ci" / "run").read_text()
