import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from testing.devices import SIMULATED, devices

os.environ["TRITON_INTERPRET"] = str(int(SIMULATED))  # Triton reads it when it is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # plain PyTorch's matmuls under `poisoned`

from ard_kernels.common import extension, findings, self_check
from testing import emulator, poison, triton_interpreter

# Drawn cases are the same in every run, so a failure is a failure everywhere.
settings.register_profile(
    "ard", max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ard")

if SIMULATED:
    triton_interpreter.repair()

# Threads do not help tiny tensors, and OpenMP's barriers cost 10x on a busy machine. Tests about threads set them.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    elsewhere = pytest.mark.skip(reason="interpreter and emulator run in tests/test_without_gpu.py beside a GPU")
    for item in items:
        if not SIMULATED and item.get_closest_marker("simulated"):
            item.add_marker(elsewhere)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A small GPU need not hold every case."""
    try:
        return (yield)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        pytest.skip(f"out of GPU memory: {error}")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture(params=devices())
def device(request):
    """Where the test allocates: torch.device("cpu"), and "cuda" on a machine with a GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _leave_a_broken_context(request):
    """After an error inside a kernel no CUDA call of a process works: end it, so that xdist begins another."""
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)  # xdist blames the test that was running
        pytest.exit(f"the CUDA context is broken: {error}", returncode=70)


@pytest.fixture(scope="session")
def emulated():
    """testing/emulator as a module, compiled at the first need; from then on backend "cuda" serves CPU tensors."""
    extension.emulated = emulator.load()
    return extension.emulated


@pytest.fixture(autouse=True)
def _emulate(request):
    callspec = getattr(request.node, "callspec", None)
    if SIMULATED and callspec and callspec.params.get("backend") == "cuda":
        request.getfixturevalue("emulated").set_seed(0)


@pytest.fixture
def emulated_beside_no_gpu(request):
    """For tests that go through backends by themselves, "cuda" among them."""
    if SIMULATED:
        request.getfixturevalue("emulated")


@pytest.fixture(params=[0, 7] if SIMULATED else [0])
def seed(request):
    """Order of the emulated threads; a GPU has its own."""
    if SIMULATED:
        request.getfixturevalue("emulated").set_seed(request.param)
    yield request.param
    if SIMULATED:
        extension.emulated.set_seed(0)


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
    with poison.poisoned():
        yield


@pytest.fixture
def unknown_machine(tmp_path, monkeypatch):
    """A machine whose record of self-checks is empty."""
    monkeypatch.setenv("ARD_CACHE_DIR", str(tmp_path))
    findings.folder.cache_clear()
    self_check.forget()
    yield tmp_path
    findings.folder.cache_clear()
    self_check.forget()
