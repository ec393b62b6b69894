import inspect
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# `benchmarks` is tested too; at the end of the path, so that an installed ard_kernels comes first.
sys.path.append(str(Path(__file__).parents[1]))

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; it reads the variable when imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import emulator
from triton.runtime import interpreter

from ard_kernels import extension

# Drawn cases are the same in every run, so a failure is a failure everywhere.
settings.register_profile(
    "ard", max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ard")


# Threads do not help tiny tensors, and OpenMP's barriers cost 10x on a busy machine. Tests about threads set them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def _patch_the_language_once():
    """The interpreter patches triton.language anew for every device function called, half of its time."""
    patch, function_call = interpreter._patch_lang, interpreter.InterpretedFunction.__call__

    def patch_all(fn):  # a kernel is launched: patch what its device functions, Triton's own included, will need
        core = patch(inspect.unwrap(interpreter.tl.max.fn))
        launch = patch(fn)
        launch.restore, restore = lambda: (restore(), core.restore()), launch.restore
        return launch

    interpreter._patch_lang = patch_all
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    yield
    interpreter._patch_lang, interpreter.InterpretedFunction.__call__ = patch, function_call


@pytest.fixture(autouse=True, scope="session")
def _round_to_bfloat16():
    """The interpreter cuts fp32 off to bfloat16 (Triton 3.7); GPUs round to nearest."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar != interpreter.tl.float32 or dst_type.scalar != interpreter.tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    yield
    interpreter.InterpreterBuilder.cast_impl = cast


@pytest.fixture(autouse=True, scope="session")
def _emulate_cuda(request):
    """The CUDA C++ kernels run in tests/emulator, on CPU tensors; built when a test asks for them."""
    homes = ("block_causal_attention", "history", "segment_adaln", "test_emulator.py", "test_fuzz.py")
    asking = (item.path for item in request.session.items if "cuda" in item.nodeid)
    if any(path.name in homes or path.parent.name in homes for path in asking):
        extension.emulated = emulator.load()


@pytest.fixture
def thread_counts():
    """Iterate over thread counts, each set while the loop body runs."""

    def each():
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            yield count

    yield each
    torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """Every torch.empty inside comes back full of NaN: an output or workspace that is not fully written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
