"""Every chip has a shipped table, and what the tuner found on a machine comes first."""

import json
import re
from pathlib import Path

import pytest
import torch

from ard_kernels import __version__, block_causal_attention
from ard_kernels.common import gpu_support, tuning
from ard_kernels.common.backends import automatic_order
from ard_kernels.common.triton_support import Launch


def test_every_chip_has_a_table():
    served = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 100, 103: 100, 120: 86, 121: 86}
    assert {arch: tuning.table_architecture(arch) for arch in served} == served


def test_what_was_tuned_here_comes_first(tmp_path, monkeypatch):
    device, key = torch.device("cuda", 0), "attention_forward/16bit/72/long"
    monkeypatch.setenv("ARD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    path = tuning.cache_file(device)
    assert re.fullmatch(rf"nvidia-test-1-{re.escape(__version__)}-triton[\d.]+\.json", path.name)
    arguments = ("attention_forward", device, torch.bfloat16, 72, 256)
    try:
        assert tuning.lookup(*arguments) == tuning.shipped(90)[key]
        tuning.lookup.cache_clear()
        tuning.tuned_here.cache_clear()
        path.write_text(json.dumps({"configs": {key: {"BLOCK_M": 64}}}))
        assert tuning.lookup(*arguments) == {"BLOCK_M": 64}
        assert (
            tuning.lookup("adaln_forward", device, torch.bfloat16, 1152)
            == tuning.shipped(90)["adaln_forward/16bit/1152/long"]
        )
    finally:
        tuning.lookup.cache_clear()
        tuning.tuned_here.cache_clear()


def test_overrides_hold_inside_their_block():
    """By key before kernel name, inner before outer; what is looked up is noted; nothing of it stays in a cache."""
    cpu, key = torch.device("cpu"), "attention_forward/16bit/72/long"
    arguments = ("attention_forward", cpu, torch.bfloat16, 72, 256)
    default = tuning.lookup(*arguments)
    with tuning.override({"attention_forward": {"BLOCK_M": 1}}, multiprocessors=7) as outer:
        assert tuning.lookup(*arguments) == {"BLOCK_M": 1} == outer[key]
        with tuning.override({key: {"BLOCK_M": 2}, "attention_forward": {"BLOCK_M": 3}}) as inner:
            assert tuning.lookup(*arguments) == {"BLOCK_M": 2} == inner[key]
            assert gpu_support.multiprocessors(cpu) == 7
        assert tuning.lookup(*arguments) == {"BLOCK_M": 1}
        with pytest.raises(KeyError), tuning.override({}, multiprocessors=1):
            raise KeyError
        assert gpu_support.multiprocessors(cpu) == 7
    assert tuning.lookup(*arguments) == default and gpu_support.multiprocessors(cpu) == 4


def test_an_override_of_no_kernel_is_refused():
    expected = "got 'attention_foward'; expected a key of the tables, or one of attention_forward"
    with pytest.raises(ValueError, match=expected), tuning.override({"attention_foward": {"BLOCK_M": 1}}):
        pass


def test_an_override_changes_a_launch_that_was_prepared_before(monkeypatch):
    """And a launch that was prepared inside does not outlive the block."""
    programs, call = [], Launch.__call__

    def counted(launch, *args):
        programs.append(launch.grid[0])
        return call(launch, *args)

    monkeypatch.setattr(Launch, "__call__", counted)
    q, k, v = torch.randn(3, 1, 1, 64, 16)
    for rows in (None, 16, 64, None):
        with tuning.override({} if rows is None else {"attention_forward": {"BLOCK_M": rows, "BLOCK_N": 16}}):
            block_causal_attention(q, k, v, segment_length=64, backend="triton")
    assert programs == [2, 4, 1, 2]  # 32 rows in the interpreter


def test_launches_run_on_the_tensors_own_gpu(monkeypatch):
    """With a stand-in for CUDA: the current device is changed for the launch, and only when it is another."""
    current, seen = [0], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *error):
            current.pop()

    class FakeTensor(torch.Tensor):
        is_cuda = True

        @property
        def device(self):
            return torch.device("cuda", self.index)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    launch = gpu_support.on_device(lambda *args: seen.append(current[-1]))
    for index in (0, 1, 0):
        x = torch.zeros(1).as_subclass(FakeTensor)
        x.index = index
        launch(None, x)
    assert seen == [0, 1, 0] and current == [0]


def test_tables_are_made_on_the_cpu_and_never_during_a_capture(monkeypatch):
    with torch.device("meta"):
        assert gpu_support.upload([1, 2], torch.device("cpu")).tolist() == [1, 2]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="new in a CUDA graph capture; call the op with it once before"):
        gpu_support.upload([1, 2], torch.device("cuda", 0))


def test_captured_tables_are_kept(monkeypatch):
    class OnGpu:
        is_cuda = True

    tables, captured = (OnGpu(),), {}
    monkeypatch.setattr(gpu_support, "_captured", captured)
    for capturing, kept in ((False, 0), (True, 1), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert gpu_support.keep_if_captured(tables) is tables and len(captured) == kept


def test_cuda_is_automatic_only_where_it_was_measured(monkeypatch):
    """Without measurements Triton is first; a table entry speaks for its op, dtype bits and width class alone."""
    device, op = torch.device("cuda", 0), "block_causal_attention"
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(tuning, "FASTEST", {"sm90": {f"{op}/16bit/72": "cuda", "adaln_modulate/16bit/1152": "torch"}})
    assert automatic_order(op, device, torch.bfloat16, 72) == ("cuda", "triton", "torch")
    assert automatic_order(op, device, torch.bfloat16, 64) == ("triton", "torch")
    assert automatic_order(op, device, torch.float32, 72) == ("triton", "torch")
    assert automatic_order("adaln_modulate", device, torch.bfloat16, 1152) == ("torch", "triton")
    assert automatic_order(op, device, torch.bfloat16, None) == ("triton", "torch")
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (8, 0))
    assert automatic_order(op, device, torch.bfloat16, 72) == ("triton", "torch")
    assert automatic_order(op, torch.device("cpu"), torch.bfloat16, 72) == ("cpu", "torch")


def test_the_shipped_table_names_its_sources():
    table = json.loads((tuning.SHIPPED / "fastest.json").read_text())
    assert table["backends"].keys() == table["sources"].keys()
    for folder in table["sources"].values():
        assert (Path(__file__).parents[1] / folder / "gpu_check.json").is_file()
    for entries in table["backends"].values():
        assert set(entries.values()) <= {"cuda", "triton", "torch", "flash"}
