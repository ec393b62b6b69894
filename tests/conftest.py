import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from testing.devices import SIMULATED, devices

os.environ["TRITON_INTERPRET"] = str(int(SIMULATED))  # Triton reads it when it is imported

from ard_kernels.common import extension
from testing import emulator, triton_interpreter

# Drawn cases are the same in every run, so a failure is a failure everywhere.
settings.register_profile(
    "ard", max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ard")

if SIMULATED:
    triton_interpreter.repair()

# Threads do not help tiny tensors, and OpenMP's barriers cost 10x on a busy machine. Tests about threads set them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture(params=devices())
def device(request):
    """Where the test allocates: torch.device("cpu"), and "cuda" on a machine with a GPU."""
    yield torch.device(request.param)
    if request.param == "cuda":
        _leave_a_broken_context()


def _leave_a_broken_context():
    """After an error inside a kernel no CUDA call of a process works: end it, so that xdist begins another."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)  # xdist blames the test that was running
        pytest.exit(f"the CUDA context is broken: {error}", returncode=70)


@pytest.fixture(autouse=True, scope="session")
def _emulate_cuda(request):
    """The CUDA C++ kernels run in testing/emulator, on CPU tensors; built when a test asks for them."""
    homes = ("block_causal_attention", "history_attention", "segment_adaln", "test_emulator.py", "test_fuzz.py")
    asking = (item.path for item in request.session.items if "cuda" in item.nodeid)
    if SIMULATED and any(path.name in homes or path.parent.name in homes for path in asking):
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
