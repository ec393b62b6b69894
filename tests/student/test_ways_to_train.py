"""Every way to train, on each device, against the same in float64 on the CPU; a run that goes on against a whole one.

The losses of a few steps are compared: means over thousands of elements, so rounding is all that may differ.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ard.common.process import Process
from fault_runs import read_log
from student.distributed_worker import STEPS, run_case
from student.training_runs import DOUBLE, GAN_GROUPS, GROUPS, Runs, execution
from torch._dynamo.utils import counters

# On a GPU D = 72 and L = 64: what the attention kernels there are compiled for.
SIZES = {"cpu": {}, "cuda": {"input_size": 16, "hidden_size": 288, "depth": 4, "num_heads": 4}}
WAYS = {
    "fp32": {},
    "recomputing": execution(activation_checkpointing=True),
    "bf16": execution(precision="bf16"),
    "compiled": execution(compile=True),
    "gan": {"gan": True},
    "gan bf16": {"gan": True} | execution(precision="bf16"),
}
EXACT = {"fp32": DOUBLE, "gan": DOUBLE | {"gan": True}}
# Largest relative differences, some 30 times those of a CPU: 1e-7 of a loss and 6e-5 of the generator's weight, a ratio
# of gradients, in fp32; 3e-3 and 7e-3 of a loss in bf16, without and with the GAN, whose weight there is rounding.
FP32 = {"loss": 3e-6}
BF16 = {"loss": 0.1}
BOUNDS = {
    "fp32": FP32,
    "compiled": FP32,
    "bf16": BF16,
    "gan": {"loss": 3e-4, "discriminator_loss": 3e-4, "generator_weight": 2e-3},
    "gan bf16": {"loss": 0.2, "discriminator_loss": 3e-3},
}


@pytest.fixture(autouse=True)
def _ieee(monkeypatch):
    """cuDNN would round the inputs of the heads' convolutions to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.fixture
def runs(folders, device) -> Runs:
    """Those of WAYS on the device."""
    return runs_in(folders / device.type, WAYS, device)


@pytest.fixture
def exact(folders, device) -> Runs:
    """In float64 on the CPU, at the sizes of the device."""
    return runs_in(folders / f"{device.type}-exact", EXACT, device, torch.device("cpu"))


def runs_in(folder: Path, cases: dict, device: torch.device, place: torch.device | None = None) -> Runs:
    sizes = {"model": SIZES[device.type]}
    return Runs(folder, {name: case | sizes for name, case in cases.items()}, Process(device=place or device))


def assert_near_float64(runs: Runs, exact: Runs, way: str) -> None:
    log, expected = read_log(runs.path(way)), read_log(exact.path("gan" if "gan" in way else "fp32"))
    assert [line["step"] for line in log] == list(range(1, STEPS + 1)) and len({line["loss"] for line in log}) == STEPS
    for line, other in zip(log, expected, strict=True):
        for name in BOUNDS[way].keys() & other.keys():
            assert abs(line[name] - other[name]) <= BOUNDS[way][name] * abs(other[name]), (way, line["step"], name)


@pytest.mark.parametrize("way", ["fp32", "bf16", "gan", "gan bf16"])
def test_losses_are_those_of_float64(runs, exact, way):
    assert_near_float64(runs, exact, way)


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_layers_share_graphs(runs, exact):
    counters.clear()
    assert_near_float64(runs, exact, "compiled")
    # The first block has no pending residual and reads history; the others are the same.
    assert counters["stats"]["unique_graphs"] == 2


def test_bf16_rounds(runs):
    assert read_log(runs.path("bf16"))[0]["loss"] != read_log(runs.path("fp32"))[0]["loss"]


def test_activation_checkpointing_changes_no_bit(runs):
    runs.assert_same("recomputing", "fp32")


@pytest.mark.parametrize(("way", "groups"), [("fp32", GROUPS), ("bf16", GROUPS), ("gan", GAN_GROUPS)])
def test_a_run_in_parts_ends_as_a_whole_one_bit_for_bit(runs, way, groups):
    parts = f"{way} in parts"
    for steps in (1, 3, STEPS):
        run_case(runs.cases[way] | {"name": parts, "train": {"steps": steps}}, runs.folder, runs.process)
    runs.assert_same(parts, way, groups=groups)
