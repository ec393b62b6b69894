"""The tests reach Triton's interpreter whatever the machine has, and its repairs hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.simulated

ROOT = Path(__file__).parents[1]
A_GPU_IN_SIGHT = """
import torch
torch.cuda.is_available = lambda: True
"""
# The int() of an array of one element is what numpy 2.4 refuses.
AS_IN_TRITON_3_6 = """
from triton.runtime import interpreter
patch = interpreter._patch_lang_tensor
def patch_as_in_3_6(tensor, *scope):
    patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data)
interpreter._patch_lang_tensor = patch_as_in_3_6
"""


def run_module(*arguments, **environment):
    command, variables = [sys.executable, "-m", *arguments], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_suite_interprets(tmp_path):
    """Beside a GPU that ARD_TEST_DEVICES hides, and with what Triton 3.6 does to numpy."""
    (tmp_path / "planted.py").write_text(A_GPU_IN_SIGHT + AS_IN_TRITON_3_6)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    tests = ["tests/block_causal_attention/test_parity.py", "-k", "test_layouts_agree and triton"]
    arguments = ["-q", "-p", "planted", "-p", "no:cacheprovider", *tests]
    hidden = {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "ARD_TEST_DEVICES": "cpu"}
    status, output = run_module("pytest", *arguments, **hidden)
    assert status == 0 and "5 passed" in output, output


@triton.jit
def copy(source, target):
    lanes = tl.arange(0, 64)
    tl.store(target + lanes, tl.load(source + lanes).to(tl.bfloat16))


def test_float32_is_rounded_to_bfloat16_as_torch_does():
    source = torch.randn(64)
    rounded = torch.empty(64, dtype=torch.bfloat16)
    copy[(1,)](source, rounded)
    assert torch.equal(rounded, source.bfloat16())


@triton.jit
def combine(a, b, sum_of, difference, product):
    x, y = tl.load(a), tl.load(b)
    tl.store(sum_of, x + y)
    tl.store(difference, x - y)
    tl.store(product, x * y)


@pytest.mark.parametrize(
    ("x", "y", "operation"),
    [(2**31 - 1, 0, None), (-(2**31), 0, None), (2**31 - 1, 1, "add"), (-(2**31), 1, "sub"), (2**16, 2**15, "mul")],
)
def test_an_offset_of_32_bits_that_overflows_is_an_error(x, y, operation):
    a, b, *results = torch.tensor([[x], [y], [0], [0], [0]], dtype=torch.int32)
    if operation:
        with pytest.raises(InterpreterError, match=f"int32 overflow in {operation}"):
            combine[(1,)](a, b, *results)
    else:
        combine[(1,)](a, b, *results)
        assert [result.item() for result in results] == [x + y, x - y, x * y]
