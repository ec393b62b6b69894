"""The tests reach Triton's interpreter whatever the machine has, and its repairs hold."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

ROOT = Path(__file__).parents[1]
# Triton 3.6's interpreter takes the int() of an array of one element, which numpy 2.4 refuses.
AS_IN_3_6 = """
from triton.runtime import interpreter
patch = interpreter._patch_lang_tensor
def patch_as_in_3_6(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))
interpreter._patch_lang_tensor = patch_as_in_3_6
"""


def run_module(*arguments, **environment):
    command, variables = [sys.executable, "-m", *arguments], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@triton.jit
def double_repeatedly(out, rounds):
    total = tl.load(out)
    for _ in range(rounds):
        total *= 2
    tl.store(out, total)


@triton.jit
def copy(source, target):
    lanes = tl.arange(0, 64)
    tl.store(target + lanes, tl.load(source + lanes).to(tl.bfloat16))


def test_a_loop_runs_as_often_as_an_argument_says(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", interpreter._patch_lang_tensor)
    exec(AS_IN_3_6, {})
    out = torch.ones(1)
    double_repeatedly[(1,)](out, 5)
    assert out.item() == 32


def test_so_it_does_in_a_dry_run_of_the_gpu_check(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AS_IN_3_6)
    arguments = ["--dry-run", "--only", "determinism,sanitizer", "--out", str(tmp_path / "out")]
    status, output = run_module("benchmarks.gpu", *arguments, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert status == 0, output


def test_float32_is_rounded_to_bfloat16_as_torch_does():
    source = torch.randn(64)
    rounded = torch.empty(64, dtype=torch.bfloat16)
    copy[(1,)](source, rounded)
    assert torch.equal(rounded, source.bfloat16())


def test_on_a_machine_with_a_gpu_the_kernels_are_interpreted_too(tmp_path):
    (tmp_path / "gpu_in_sight.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    tests = ["tests/block_causal_attention/test_parity.py", "-k", "test_layouts_agree and triton"]
    plugins = ["-p", "gpu_in_sight", "-p", "no:cacheprovider"]
    status, output = run_module("pytest", "-q", *plugins, *tests, PYTHONPATH=path, TRITON_INTERPRET="0")
    assert status == 0 and "5 passed" in output, output
