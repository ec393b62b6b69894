"""`ard flops`: analytic equals counted, to the published numbers; and the shape of the command line."""

import json

import pytest
import torch
from ard.cli import app
from ard.flops import counted_flops, flop_table
from ard.model import DiTConfig
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

ROWS = ["teacher_forward", "baseline_sampling", "student_sampling", "student_training_forward", "overhead"]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("history_layers, student", [(0, 948971372544), (6, 959843008512), (28, 999705673728)])
def test_dit_xl_2_as_published(history_layers, student):
    table = flop_table(DiTConfig.from_name("DiT-XL/2"), steps=4, history_layers=history_layers)
    assert list(table) == ROWS
    expected = dict(zip(ROWS, [237242843136, 948971372544, student, student, student / 948971372544 - 1], strict=True))
    for row, value in expected.items():
        assert table[row] == {"analytic": value, "counted": value}, row


@pytest.mark.parametrize("mask", [(1, 0), (2, 0), (1, 1), (3, 2), (None, 0)])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_analytic_equals_counted(mask, steps):
    config = DiTConfig(
        input_size=(4, 8),
        in_channels=3,
        hidden_size=24,
        depth=3,
        num_heads=3,
        mlp_ratio=2.5,
        num_classes=4,
        learn_sigma=False,
        frequency_embedding_size=32,
    )
    for history_layers in (0, 2, 3):
        table = flop_table(config, steps=steps, history_layers=history_layers, window=mask[0], sink=mask[1])
        for row, values in table.items():
            assert values["analytic"] == values["counted"], (row, history_layers)


def test_adaln_runs_on_segments_not_tokens():
    """Without history the training forward costs exactly S teacher forwards."""
    counted = counted_flops(DiTConfig.from_name("DiT-B/4"), steps=5, history_layers=0)
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
    config = DiTConfig.from_name("DiT-XL/2")
    with LargestAllocation() as largest:
        counted_flops(config, steps=4, history_layers=6)
    assert largest.elements <= config.tokens * config.hidden_size  # the fixed positions, the only values computed


def test_json_and_table():
    result = run("flops", "--model", "DiT-XL/2", "--steps", "4", "--history-layers", "6", "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.output)
    assert list(table) == ROWS
    assert table["student_training_forward"] == {"analytic": 959843008512, "counted": 959843008512}
    assert table["overhead"]["counted"] == pytest.approx(0.011456, abs=1e-6)
    human = run("flops", "--model", "DiT-S/8", "--history-layers", "2", "--window", "1", "--sink", "1")
    assert human.exit_code == 0 and "teacher forward" in human.output and "overhead" in human.output


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
    assert "torch" in result.output
