"""Beside a GPU: Triton's interpreter, the emulator and all they run on CPU tensors, in a process without the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing.devices import SIMULATED
from testing.rooms import ROOMS

TESTS = Path(__file__).parent
FILES = ("derivatives", "emulator", "fuzz", "layer", "model_sizes", "triton_interpreter")


@pytest.mark.skipif(SIMULATED, reason="without a GPU these tests are in this run")
@pytest.mark.parametrize("tests", [*ROOMS, *(f"test_{name}.py" for name in FILES)])
def test_what_is_simulated_passes(tests):
    environment = os.environ | {"ARD_TEST_DEVICES": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not exhaustive", str(TESTS / tests)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
