"""`ard flops`: analytic equals counted, to the published numbers; and the shape of the command line."""

import json

import pytest
import torch
from ard.models.dit import DiTConfig
from ard.models.flops import counted_flops, flop_table
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = ["teacher_forward", "baseline_sampling", "student_sampling", "student_training_forward", "overhead"]


def run(*arguments):
    from command_line import ard

    return ard(*arguments)


@pytest.mark.parametrize(
    "history_layers, student", [(6, 959843008512), pytest.param(28, 999705673728, marks=pytest.mark.slow)]
)
def test_dit_xl_2_as_published(history_layers, student):
    table = flop_table(DiTConfig.from_name("DiT-XL/2"), steps=4, history_layers=history_layers)
    assert list(table) == ROWS
    expected = dict(zip(ROWS, [237242843136, 948971372544, student, student, student / 948971372544 - 1], strict=True))
    for row, value in expected.items():
        assert table[row] == {"analytic": value, "counted": value}, row


@pytest.mark.parametrize(
    "steps, history_layers, window, sink",
    [(4, 2, 1, 0), (4, 1, 2, 0), (4, 1, 1, 1), (4, 2, 2, 1), (4, 1, None, 0), (4, 0, None, 0), (1, 1, 1, 1)],
)
def test_analytic_equals_counted(steps, history_layers, window, sink):
    config = DiTConfig(
        input_size=(4, 8),
        in_channels=3,
        hidden_size=24,
        depth=2,
        num_heads=3,
        mlp_ratio=2.5,
        num_classes=4,
        learn_sigma=False,
        frequency_embedding_size=32,
    )
    table = flop_table(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
    for row, values in table.items():
        assert values["analytic"] == values["counted"], row


def test_adaln_runs_on_segments_not_tokens():
    """Without history the training forward costs exactly S teacher forwards."""
    counted = counted_flops(DiTConfig.from_name("DiT-S/4", depth=2), steps=5, history_layers=0)
    assert counted["student_training_forward"] == 5 * counted["teacher_forward"] == counted["student_sampling"]


class LargestAllocation(TorchDispatchMode):
    """Remembers the most elements any operation put outside the meta device."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.elements = max(self.elements, out.numel())
        return out


def test_no_weights_are_allocated():
    config = DiTConfig.from_name("DiT-L/8", depth=2)  # a weight has 64 times the elements of all positions
    with LargestAllocation() as largest:
        counted_flops(config, steps=4, history_layers=1)
    assert largest.elements <= config.tokens * config.hidden_size  # the fixed positions, the only values computed


def test_json_and_table():
    options = ["--model", "DiT-S/8", "--steps", "3", "--history-layers", "2", "--window", "1", "--sink", "1"]
    result = run("flops", *options, "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.output)
    assert table == flop_table(DiTConfig.from_name("DiT-S/8"), steps=3, history_layers=2, window=1, sink=1)
    human = run("flops", *options)
    assert human.exit_code == 0 and "teacher forward" in human.output and "overhead" in human.output
    assert f"{table['student_sampling']['counted']:,}" in human.output


def test_bad_arguments_name_the_problem():
    result = run("flops", "--model", "DiT-Q/2")
    assert result.exit_code == 2 and "DiT-Q/2" in result.output
    assert run("flops", "--steps", "0").exit_code == 2


def test_every_command_has_help():
    listing = run("--help")
    for command in ("flops", "doctor", "demo"):
        assert command in listing.output
        assert run(command, "--help").exit_code == 0


def test_doctor_runs():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch ", "extension: ard_kernels._C", "gate_residual_adaln", "refused: ", "available"):
        assert word in result.output
