"""Every hostile file is answered by one line, quickly, in little memory, with nothing written but below "out"."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile_files import CASES, DISTILL, EVALUATE, FINETUNE, LATENTS, PUBLIC, SAMPLE, VERIFY, answer, good_files

pytestmark = pytest.mark.exhaustive
pytest.importorskip("diffusers")

MEBIBYTES = 1024
GOOD = [LATENTS, ["sample", "student.safetensors", *SAMPLE], ["sample", "run", *SAMPLE], EVALUATE, VERIFY, DISTILL]
GOOD += [FINETUNE, ["export", "dit", *PUBLIC], ["evaluate", "samples", "--reference", "digits"]]


def snapshot(folder: Path) -> dict[str, tuple]:
    """Of everything but what is in "out": kind, size, time of the last change."""
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "out")
    return {str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    good_files(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "work")
    (tmp_path / "work" / "out").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("arguments", GOOD, ids=lambda arguments: " ".join(arguments[:2]))
def test_good_files_are_taken(folder, arguments):
    status, growth, errors = answer(arguments, folder)
    assert status == 0 and not [line for line in errors if line.startswith("ard:")], errors
    assert growth < MEBIBYTES


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused(folder, name):
    arguments = CASES[name](folder)
    assert sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) < 32 << 20, "not tiny"
    before = snapshot(folder.parent)
    status, growth, errors = answer(arguments, folder)
    assert status not in (0, None), (status, errors)
    said = [line for line in errors if line.startswith("ard:")]
    assert len(said) == 1 and not any(line.startswith(("Traceback", "Aborted")) for line in errors), errors
    assert len(said[0]) < 1500, said
    assert growth < MEBIBYTES
    assert {k: v for k, v in snapshot(folder.parent).items() if "/work/out" not in k} == {
        k: v for k, v in before.items() if "/work/out" not in k
    }
