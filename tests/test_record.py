"""ARD_RECORD_SHAPES: every kind of raw call once, whoever makes it, and nothing of what its tensors hold."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ard_kernels import HistoryCache, history_attention
from ard_kernels.common import record
from ard_kernels.history_attention import op as history_op
from ard_kernels.history_attention import places
from ard_kernels.tune.calls import Call, read_calls

ROOT = Path(__file__).parents[1]


def started(code, file, *arguments):
    environment = {**os.environ, "ARD_RECORD_SHAPES": str(file), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


WAYS = """
import torch
from ard_kernels import segment_attention, SegmentMask

def attend(q, k, v):
    return segment_attention(q, k, v, SegmentMask.block_causal(2), segment_length=q.shape[2] // 2, backend="torch")

def step(tokens, attend=attend):
    for _ in range(2):
        q, k, v = torch.randn(3, 1, 2, tokens, 8, requires_grad=True).unbind()
        attend(q, k, v).sum().backward()

step(8)
for tokens, backend in ((16, "eager"), (32, "aot_eager")):
    step(tokens, torch.compile(attend, backend=backend, fullgraph=True))
with torch.no_grad():
    attend(*torch.randn(3, 1, 2, 64, 8))
try:
    torch.ops.ard.segment_attention(*torch.randn(3, 1, 2, 128, 8), "causal None 0", [3], [3], 1.0, "torch")
except ValueError:
    pass
"""


def test_each_kind_is_recorded_once_however_it_is_called(tmp_path):
    """Eager, with a gradient, in compiled code, without a gradient; not what raises."""
    file = tmp_path / "shapes.jsonl"
    process = started(WAYS, file)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    calls = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = [(call["op"], call["inputs"][2]["shape"][2]) for call in calls]
    both = ("segment_attention", "segment_attention_backward")
    assert sorted(kinds) == sorted([(op, tokens) for op in both for tokens in (8, 16, 32)] + [(both[0], 64)])
    first = calls[0]
    assert first.keys() == {"op", "inputs"} and first["inputs"][3:] == ["2|0:1|0:2", [4], [4], 1 / math.sqrt(8)]
    assert first["inputs"][1] == {"shape": [1, 2, 8, 8], "strides": [128, 64, 8, 1], "dtype": "float32"}


MANY = """
import sys, torch, ard_kernels
for tokens in range(1, 201):
    x = torch.zeros(1, tokens, 8)
    ard_kernels.adaln_modulate(x, segment_length=tokens, backend="torch")
"""


def test_the_librarys_own_calls_are_not_the_users(tmp_path):
    """A self-check makes calls of its own, and goes through other shapes than the program's."""
    code = """
import torch, ard_kernels
from ard_kernels.common import self_check
from ard_kernels.common.findings import Kind
print(self_check.examine(Kind("gelu", "cpu", torch.float32, 0), torch.device("cpu"), 2).status)
ard_kernels.gelu(torch.randn(3, 5))
"""
    file = tmp_path / "shapes.jsonl"
    output, _ = started(code, file).communicate()
    assert output == "passed\n"
    (call,) = read_calls(file)
    assert call.inputs["x"]["shape"] == [3, 5]


def test_processes_share_a_file(tmp_path):
    file = tmp_path / "shapes.jsonl"
    for process in [started(MANY, file) for _ in range(2)]:
        assert (process.communicate()[0], process.returncode) == ("", 0)
    assert len(file.read_text().splitlines()) == 400
    assert sorted(call.tensors["x"]["shape"][1] for call in read_calls(file)) == list(range(1, 201))


def test_a_file_that_cannot_be_written_is_heard_of_at_import(tmp_path):
    process = started("import ard_kernels", tmp_path / "absent" / "file")
    output, _ = process.communicate()
    assert process.returncode == 1 and "absent/file'; expected a file that can be written" in output


def test_nothing_is_wrapped_without_the_variable():
    assert not record.RECORDING, "this process has not set it"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """What calls of history_attention in this process are recorded in."""
    path = tmp_path / "shapes.jsonl"
    monkeypatch.setattr(record, "_file", os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    monkeypatch.setattr(record, "_recorded", set())
    kernel = record.recorded("history_attention", history_op._history, history_op._of_one_layer)
    monkeypatch.setattr(sys.modules["ard_kernels.history_attention"], "history_op", kernel)
    yield path
    os.close(record._file)


@pytest.mark.parametrize("sink, window", [(0, 1), (1, 2), (2, 3)])
def test_a_stream_without_end_has_few_kinds(file, sink, window):
    """And in each the segment has the place it has in one of the calls: written by value, as the kernels read it."""
    cache = HistoryCache.rolling(2, 1, 1, 8, segment_length=4, window=window, sink=sink)
    q = torch.randn(1, 1, 4, 8)
    seen = set()
    for step in range(20):
        for commit in (False, True):
            for layer in range(2):
                at = places.Stand(cache.positions.tolist(), 2, step)
                at.add([4])
                seen.add((commit, *at.place(step, window, sink)))
                history_attention(q, q, q, cache, layer=layer, commit=commit, backend="torch")
    recorded = set()
    for call in read_calls(file):
        positions, layer = call.make(torch.device("cpu"))["positions"].numpy(), call.inputs["layer"]
        at = places.stand("test", positions, 1, cache.capacity, layer, [4], window, sink)
        recorded.add((call.inputs["commit"], *at.place(at.taken, window, sink)))
        assert call.tensors["keys"]["shape"][0] == 1
    assert recorded == seen
    assert len(read_calls(file)) <= 2 * (sink + 2 * window + 1)


def test_a_growing_cache_is_recorded_without_what_lies_ahead(file):
    cache = HistoryCache(2, 1, 1, 8, 1000)
    q = torch.randn(1, 1, 4, 8)
    for _ in range(2):
        cache.reset()
        for _ in range(3):
            for layer in range(2):
                history_attention(q, q, q, cache, layer=layer, backend="torch")
    values = [call.tensors["positions"]["values"] for call in read_calls(file)]
    assert values == [[], [0, 0, 0, 0, 1, 0, 4], [0, 0, 0, 0, 2, 0, 4, 8]]


def test_positions_of_nobody_raise_what_the_op_raises(file):
    cache = HistoryCache(1, 1, 1, 8, 8)
    cache.positions[1] = 7
    with pytest.raises(ValueError, match=r"history_attention: cache\.positions is damaged"):
        history_attention(*torch.randn(3, 1, 1, 4, 8), cache, layer=0, backend="torch")
    assert file.read_text() == ""


GELU = '{{"op": "gelu", "inputs": [{}]}}'
LINES = ["", "{}", "[1]", GELU.format(""), '{"op": "none", "inputs": [1]}', GELU.format(3)]
LINES += [GELU.format(f'{{"shape": {shape}, "strides": [1], "dtype": "{dtype}"}}')
          for shape, dtype in (([2], "flout"), ([2, 2], "float32"), ([2], "int64"), (["2"], "float32"))]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_no_call_is_named(tmp_path, line):
    path = tmp_path / "shapes.jsonl"
    path.write_text(f"{record.line_of('gelu', [torch.zeros(2), 'cpu'])}\n{line}\n")
    with pytest.raises(ValueError, match=r"shapes\.jsonl:2: got .*; expected a call that ARD_RECORD_SHAPES has"):
        read_calls(path)


def test_an_empty_record_is_refused(tmp_path):
    path = tmp_path / "shapes.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="got an empty file"):
        read_calls(path)


def test_integers_of_numpy_are_integers():
    x = torch.zeros(1, 4, 8)
    by_numpy, by_python = (
        record.line_of("segment_adaln", [x, None, None, None, None, None, None, [four], "rms", 1e-6, x.dtype, "cpu"])
        for four in (np.int64(4), 4)
    )
    assert by_numpy == by_python


def test_calls_are_equal_by_their_line():
    line = record.line_of("gelu", [torch.zeros(2, dtype=torch.float16), "cpu"])
    assert Call.of(line) == Call.of(line) and len({Call.of(line), Call.of(line)}) == 1
    assert Call.of(line).dtype == torch.float16
