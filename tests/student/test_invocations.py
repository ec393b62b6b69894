"""Wrong invocations of the `ard` command: one line that says what was expected, nothing written, never a traceback."""

from __future__ import annotations

import pytest
import torch
from ard.cli import app
from ard.cli_base import refusals
from ard.files import readable_size
from ard.recipe import read_recipe
from ard.shards import _require_space
from typer import Exit
from typer.testing import CliRunner


def refused(*arguments: str) -> str:
    """The line that `ard` answers with."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (arguments, result.output, result)
    *progress, line = result.stderr.splitlines()
    assert line.startswith("ard: ") and not any(other.startswith(("ard:", "Traceback")) for other in progress)
    return line


def test_demo_whose_out_is_a_file_is_refused(tmp_path):
    (tmp_path / "report").write_text("mine")
    assert "report" in refused("demo", "--quick", "--out", str(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.parametrize(
    "changes, message",
    [
        (["model.num_classes=5"], "model.num_classes is 5; expected 10, those of digits"),
        (["model.num_classes=20"], "model.num_classes is 20; expected 10, those of digits"),
        (["model.input_size=16"], "model is of (1, 16, 16); expected (1, 8, 8), the images of digits"),
        (["model.in_channels=3"], "model is of (3, 8, 8); expected (1, 8, 8), the images of digits"),
    ],
)
def test_a_teacher_of_other_sizes_than_its_data_is_refused(tmp_path, changes, message):
    out = tmp_path / "teacher"
    assert message in refused("teacher", "-c", "digits", "--out", str(out), "teacher.train.steps=1", *changes)
    assert not out.exists()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 2**128, 10**40])
def test_seeds_that_no_generator_takes_are_refused(tmp_path, seed):
    for arguments in (["sample", "run"], ["latents", "images", "--vae", "vae"]):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--seed", str(seed)])
        assert result.exit_code == 2 and "--seed" in result.output and not (tmp_path / "out").exists()
    assert "distill.seed" in refused("distill", "-c", "digits", "--out", str(tmp_path / "out"), f"distill.seed={seed}")


def test_largest_seed_is_taken_by_both_generators():
    from ard.streams import noise_at

    seed = read_recipe("digits", [f"distill.seed={2**63 - 1}"]).distill.seed
    torch.manual_seed(seed)
    assert noise_at(seed + 1, [0], (2,)).isfinite().all()  # previews take the next one


def tensors_without_end() -> None:
    torch.empty(2**58, device="cpu").fill_(0)


def bytes_without_end() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("work", [tensors_without_end, bytes_without_end])
def test_out_of_memory_is_one_line(capsys, work):
    with pytest.raises(Exit) as end, refusals():
        work()
    assert end.value.exit_code == 1
    error = capsys.readouterr().err
    assert error.startswith("ard: out of memory") and error.count("\n") == 1


def test_other_errors_stay_errors():
    with pytest.raises(RuntimeError, match="of ours"), refusals():
        raise RuntimeError("a mistake of ours")


def test_an_error_of_several_lines_is_one(capsys):
    with pytest.raises(Exit), refusals():
        raise ValueError("one\n  two\nthree")
    assert capsys.readouterr().err == "ard: one two three\n"


def test_sizes_have_a_unit_that_fits(tmp_path, monkeypatch):
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.00 KiB", 12_345_678: "11.77 MiB", 5 * 2**40: "5.00 TiB"}
    assert {size: readable_size(size) for size in sizes} == sizes
    assert readable_size(2**70) == "1,073,741,824.00 TiB"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 3000}))
    with pytest.raises(OSError, match=r": 3.91 KiB are still to be written; .* the 2.93 KiB that are free"):
        _require_space(tmp_path, 4000)


def test_plan_shows_small_sizes():
    result = CliRunner().invoke(app, ["distill", "-c", "digits", "--dry-run", "--processes", "1"])
    assert result.exit_code == 0 and "MiB" in result.output and "0.00 GiB" not in result.output
