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


@pytest.mark.parametrize("name", ["ard_kernels.doctor", "ard"])
def test_doctor(name):
    status, output = run_python("-m", name, *(["doctor"] if name == "ard" else []))
    assert status == 0, output
    for word in ("torch ", "extension: ard_kernels._C", "gate_residual_adaln", "refused: ", "available"):
        assert word in output


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("1", "ARD_BUILD_CUDA=1 needs nvcc, and none is on PATH"),
        ("yes", "ARD_BUILD_CUDA is 'yes'; expected auto, 0 or 1"),
    ],
)
def test_build_cuda_is_read(choice, message, tmp_path):
    status, output = run_python(
        "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path),
        ARD_BUILD_CUDA=choice, PATH=str(tmp_path), CUDA_HOME="", CUDA_PATH="",
    )  # fmt: skip
    assert status != 0 and message in output


def test_backend_from_the_environment():
    code = "import torch, ard_kernels as k; x = torch.randn(1, 2, 8); k.gate_residual(x, x, x, segment_length=1)"
    assert run_python("-c", code, ARD_BACKEND="torch")[0] == 0
    status, output = run_python("-c", code, ARD_BACKEND="triton", TRITON_INTERPRET="0")
    assert status != 0 and "'triton' (environment ARD_BACKEND) cannot run" in output
