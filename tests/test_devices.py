"""What runs where: collected as on a machine with a GPU, by a stand-in that says there is one."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing.cases import OPS
from testing.rooms import GPU_ROOMS, ROOMS

ROOT = Path(__file__).parents[1]
A_GPU_IN_SIGHT = "import torch\ntorch.cuda.is_available = lambda: True\n"
# Of each room: what compares values, what compares gradients, what holds the contract.
PARITY = {
    "block_causal_attention": ["test_parity.py::test_equal_segments", "test_parity.py::test_drawn_cases"],
    "history_attention": ["test_history.py::test_steps_equal_the_dense_reference", "test_rolling.py::test_a_stream"],
    "segment_adaln": ["test_parity.py::test_model_width", "test_parity.py::test_strides_and_ragged_segments"],
    "qk_norm_rope": ["test_parity.py::test_models", "test_parity.py::test_drawn_cases"],
}
GRADIENTS = {
    "block_causal_attention": ["test_parity.py::test_any_scale", "test_parity.py::test_tokens_that_overlap_in_memory"],
    "history_attention": ["test_gradient.py::test_the_cache_may_change_before_the_gradient_is_asked_for"],
    "segment_adaln": ["test_parity.py::test_only_one_output_used", "test_parity.py::test_expanded_rows_and_inputs"],
    "qk_norm_rope": ["test_parity.py::test_expanded_inputs_and_gradients"],
}
CONTRACT = {
    "block_causal_attention": ["bit_equal_over_runs_and_threads", "opcheck", "compiles_to_one_graph", "autocast"],
    "history_attention": ["bit_equal_over_threads_and_runs", "opcheck", "compiles_to_one_graph", "autocast"],
    "segment_adaln": ["bit_equal_over_runs_and_threads", "opcheck", "compiles_to_one_graph", "autocast"],
    "qk_norm_rope": ["bit_equal_over_runs_and_threads", "opcheck", "compiles_to_one_graph", "autocast"],
}
WHERE = re.compile(r"(?:torch|cpu|triton|cuda)-on-(?:cpu|cuda)")
MODEL_SIZES = ("test_values", "test_repeats_are_bit_equal", "test_cuda_graph_equals_eager")


def collected_beside_a_gpu(folder):
    """Node ids of the rooms' tests, as a machine with a GPU would collect them."""
    (folder / "planted.py").write_text(A_GPU_IN_SIGHT)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = environment | {"PYTHONPATH": path} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "planted", "-p", "no:cacheprovider"]
    command += [*(f"tests/{room}" for room in ROOMS), "tests/test_model_sizes.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_a_gpu_gets_every_kind_of_test_and_no_simulation(tmp_path):
    collected = collected_beside_a_gpu(tmp_path)
    for room, backend in itertools.product(GPU_ROOMS, ("triton", "cuda")):
        on_gpu = [line for line in collected if room in line and f"{backend}-on-cuda" in line]
        wanted = PARITY[room] + GRADIENTS[room] + [f"test_{name}" for name in CONTRACT[room]]
        for name in wanted:
            assert any(name in line for line in on_gpu), f"{backend}, {name}"
    for name, op, backend in itertools.product(MODEL_SIZES, OPS, ("triton", "cuda")):
        assert any(f"::{name}[{backend}-on-cuda-{op}_" in line for line in collected), f"{backend}, {op}, {name}"
    pairs = {pair for line in collected for pair in WHERE.findall(line)}
    assert pairs == {"torch-on-cpu", "cpu-on-cpu", "torch-on-cuda", "triton-on-cuda", "cuda-on-cuda"}
