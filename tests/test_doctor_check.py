"""`doctor.check`: a process of its own runs every kernel, and what it finds is on record."""

import sys

import pytest
import torch

from ard_kernels import doctor
from ard_kernels.common import backends, self_check
from ard_kernels.common.findings import FAILED, PASSED

CPU = torch.device("cpu")
pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("unknown_machine")]

PLANT = """
import os, signal, sys, time
import torch
from ard_kernels import doctor
from ard_kernels.gelu import cpu
{mistake}
sys.exit(doctor.main(["--child"]))
"""


@pytest.mark.parametrize(
    ("mistake", "why"),
    [
        pytest.param("", "", marks=pytest.mark.slow),
        ("cpu.forward = lambda x, y: os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with status -11"),
        pytest.param("cpu.backward = lambda *_: time.sleep(600)", "no answer in 60 s", marks=pytest.mark.slow),
        pytest.param(
            "real = cpu.forward; cpu.forward = lambda x, y: (real(x, y), y[:1].add_(1))",
            "y: error",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["none", "crash", "hang", "values"],
)
def test_the_doctor_survives_what_it_finds(mistake, why, monkeypatch, tmp_path):
    """In a process of its own: the kinds after one that took it with it are checked by another."""
    units = {op: unit for op, unit in self_check.UNITS.items() if op in ("gelu", "gate_residual")}
    monkeypatch.setattr(self_check, "UNITS", {op: unit._replace(widths=(8,)) for op, unit in units.items()})
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    script = tmp_path / "child.py"
    script.write_text(PLANT.format(mistake=mistake))
    rows = [row for row in doctor.check(child=[sys.executable, str(script)], seconds=60) if row.backend == "cpu"]
    by_op = {row.op: row for row in rows if row.device == "cpu"}
    assert by_op["gate_residual"].status == PASSED and by_op["gate_residual"].repeats == self_check.THOROUGH
    assert by_op["gelu"].status == (FAILED if why else PASSED) and why in by_op["gelu"].why
    chosen = backends.resolve("gelu", None, CPU, torch.float32, 8)
    assert chosen == ("torch" if why else "cpu"), "what it found is on record"


def test_a_child_that_does_not_start_is_no_finding(monkeypatch):
    with pytest.raises(RuntimeError, match="did not start, it ended with 3"):
        list(doctor.check(child=[sys.executable, "-c", "raise SystemExit(3)"]))


def test_the_table_says_what_was_not_checked(monkeypatch, capsys):
    """On a machine without a GPU; the exit status tells of failures."""
    row = doctor.Checked("cpu", "gelu", "cpu", "float32", 0, FAILED, "y: error", 3.0, 50, 1.0)
    monkeypatch.setattr(doctor, "check", lambda ops: [row, row._replace(op="other", backend="cuda", status="refused")])
    assert doctor.main(["--check"]) == 1
    text = capsys.readouterr().out
    assert "cpu    failed  float32: y: error" in text
    assert "no GPU is visible to torch: no GPU kernel was checked" in text
    assert "1 failed, 1 refused" in text


def test_an_op_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--check", "attention"])
    assert "op is 'attention'; expected one of adaln_modulate, block_causal_attention" in capsys.readouterr().err
