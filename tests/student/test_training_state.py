"""Checkpoints of a run: damage of any file is found, the newest good one is taken, old ones go."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from ard.storage import checkpoints
from ard.storage.checkpoints import CHECKPOINT_NAME
from ard.storage.files import DamagedFile, file_sha256, read_sealed_json, write_sealed_json
from fault_runs import SAVES, Child, damages, litter, rewrite, save_many, snapshot, toy_trainer, train

FILES = ["checkpoint.json", *(f"{part}.safetensors" for part in ("model", "ema", "optimizer", "rng", "objective"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 6 steps with the checkpoints of steps 4, 5 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, steps=6)
    return folder


def checkpoint(run: Path, step: int = 6) -> Path:
    return run / f"checkpoints/step-{step:08d}"


def test_files_of_a_checkpoint_carry_their_hashes(run):
    assert sorted(path.name for path in checkpoint(run).iterdir()) == sorted(FILES)
    facts = json.loads((checkpoint(run) / CHECKPOINT_NAME).read_text())
    assert facts["step"] == 6 and facts["facts"]["kind"] == "toy"
    assert facts["parts"] == {name[:-12]: file_sha256(checkpoint(run) / name) for name in FILES[1:]}


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_cut_and_missing_file_is_found(run, tmp_path, name):
    folder = tmp_path / "step-00000006"
    shutil.copytree(checkpoint(run), folder)
    path, content = folder / name, (folder / name).read_bytes()
    for damaged in damages(content):
        rewrite(path, damaged)
        with pytest.raises(DamagedFile, match=name):
            checkpoints.verified(folder)
    path.unlink()
    with pytest.raises(DamagedFile, match=name):
        checkpoints.verified(folder)
    path.write_bytes(content)
    assert checkpoints.verified(folder).step == 6


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_fallback_is_the_checkpoint_before_and_training_ends_the_same(run, tmp_path, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = checkpoint(folder) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:half], "empty": b""}[damage])
    with pytest.warns(UserWarning, match=rf"step-00000006 is damaged, falling back.*{name}"):
        trainer = toy_trainer(folder)
    assert trainer.step == 5
    trainer.fit()
    assert snapshot(folder) == snapshot(run)  # the damaged one is replaced


def test_damaged_checkpoint_of_a_later_step_is_gone_after_the_next_save(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for step in (5, 6):
        (checkpoint(folder, step) / "ema.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"step-0000000[56] is damaged") as caught:
        assert toy_trainer(folder, steps=5).fit().step == 5
    assert len(caught) == 2
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest(folder / "checkpoints").step == 5


def test_all_damaged_is_an_error_and_none_is_none(run, tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere") is None
    shutil.copytree(run, tmp_path / "run")
    for step in (4, 5, 6):
        (checkpoint(tmp_path / "run", step) / CHECKPOINT_NAME).unlink()
    with pytest.warns(UserWarning), pytest.raises(DamagedFile, match=r"all 3 checkpoints are damaged"):
        checkpoints.newest(tmp_path / "run/checkpoints")
    with pytest.warns(UserWarning), pytest.raises(DamagedFile):
        toy_trainer(tmp_path / "run")
    assert toy_trainer(tmp_path / "run", resume=False).step == 0


def test_another_format_is_refused_and_not_taken_for_damage(run, tmp_path):
    shutil.copytree(checkpoint(run), tmp_path / "step-00000006")
    write_sealed_json(tmp_path / "step-00000006" / CHECKPOINT_NAME, {"format": "ard-checkpoint", "version": 99})
    with pytest.raises(ValueError, match=r"version=99; expected 'ard-checkpoint', 1"):
        checkpoints.newest(tmp_path)


def test_parts_are_read_back_and_unknown_ones_refused(tmp_path):
    parts = {"a": {"x": torch.randn(3), "n": torch.tensor(7)}, "b": {}}
    saved = checkpoints.save(tmp_path, 3, parts, {"k": [1, None]}, keep_last=1)
    found = checkpoints.verified(saved.folder)
    assert found == saved == checkpoints.newest(tmp_path) and found.facts == {"k": [1, None]}
    assert all(torch.equal(found.read("a")[name], value) for name, value in parts["a"].items())
    assert found.read("b") == {}
    with pytest.raises(ValueError, match=r"has no 'c'; expected one of \['a', 'b'\]"):
        found.read("c")


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_the_newest_are_kept(tmp_path, keep_last):
    for step in (2, 4, 6, 8):
        checkpoints.save(tmp_path, step, {"a": {}}, {}, keep_last=keep_last)
    steps = sorted(int(path.name[5:]) for path in tmp_path.iterdir())
    assert steps == [2, 4, 6, 8][-keep_last:]
    with pytest.raises(ValueError, match=r"keep_last: got 0; expected at least 1"):
        checkpoints.save(tmp_path, 9, {"a": {}}, {}, keep_last=0)


def test_failed_save_leaves_the_checkpoints_as_they_were(tmp_path):
    checkpoints.save(tmp_path, 1, {"a": {}}, {}, keep_last=1)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError):
        checkpoints.save(tmp_path, 2, {"a": {}}, {"value": float("nan")}, keep_last=1)
    assert snapshot(tmp_path) == before and litter(tmp_path) == []


def test_what_a_killed_save_has_left_goes_and_what_others_have_put_there_stays(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"a": {}}, {}, keep_last=2)
    (tmp_path / ".ard-tmp-x/step-00000003").mkdir(parents=True)
    theirs = ["step-00000000", "step-7", "step-best", "step-00000005"]
    for name in theirs:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000000/notes.txt").write_text("mine")
    (tmp_path / "step-00000005/model.safetensors").write_text("mine")
    (tmp_path / "step-00000006").symlink_to(tmp_path / "step-00000002")
    theirs.append("step-00000006")
    checkpoints.save(tmp_path, 3, {"a": {}}, {}, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "step-00000003"])
    checkpoints.remove_all(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(theirs)
    with pytest.raises(FileExistsError, match=r"step-00000005 exists; expected a new folder"):
        checkpoints.save(tmp_path, 5, {"a": {}}, {}, keep_last=1)


def test_a_run_in_training_can_be_read_at_any_moment(tmp_path):
    """One checkpoint is kept: between its listing and its reading it may be gone, and a newer one there."""
    saving = Child(save_many, tmp_path)
    seen, ended = set(), False
    while not ended:
        ended = not saving.alive()
        if found := checkpoints.read_newest(tmp_path, ["a"]):
            checkpoint, (tensors,) = found
            assert torch.equal(tensors["x"], torch.full((1 << 15,), float(checkpoint.step)))
            seen.add(checkpoint.step)
    assert saving.kill_after(None)[1] and max(seen) == SAVES and len(seen) > 20


@pytest.mark.parametrize(
    "changes",
    [{"parts": {"../model": "0" * 64}}, {"parts": ["model"]}, {"parts": {"model": 1}}, {"step": "1"}, {"step": -1},
     {"step": True}, {"facts": []}, {"facts": None}],
)  # fmt: skip
def test_content_of_another_kind_is_damage_whatever_its_sha256(tmp_path, changes):
    folder = checkpoints.save(tmp_path, 1, {"model": {"a": torch.zeros(1)}}, {}, keep_last=1).folder
    content = read_sealed_json(folder / CHECKPOINT_NAME)
    write_sealed_json(folder / CHECKPOINT_NAME, {**content, **changes})
    with pytest.raises(DamagedFile, match=r"checkpoint\.json: expected a step, facts, and parts by plain names"):
        checkpoints.verified(folder)
