"""Samples are functions of (seed, index), written whole; latents where nothing decodes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ard.common.process import Process
from ard.common.streams import noise_at
from ard.conditions.sources import Classes
from ard.diffusion.sampling import LEAST_SHARD, SamplingConfig, parse_classes, sampler, write_samples
from ard.models.dit import DiTConfig
from ard.models.sit import SiTConfig
from ard.models.student import ARDStudent
from ard.storage.images import to_uint8, write_grid
from ard.weights.opened import random_teacher
from fault_runs import DEATHS, Child, dying
from safetensors.torch import load_file


def student_of(channels: int = 1, device: torch.device | str = "cpu") -> ARDStudent:
    sizes = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "learn_sigma": False}
    teacher, _ = random_teacher(DiTConfig(**sizes, in_channels=channels))
    with torch.no_grad():
        teacher.final_layer.linear.weight.mul_(20.0)
    return ARDStudent.from_teacher(teacher.to(device), steps=3, history_layers=1)


def images_of(folder) -> np.ndarray:
    return np.load(folder / "samples.npz", allow_pickle=False)["arr_0"].astype(int)


@pytest.mark.usefixtures("pillow")
def test_samples_are_the_students_own(tmp_path, device):
    student, config = student_of(device=device), SamplingConfig(count=5, batch_size=5, seed=3, classes=(2, 0))
    content = write_samples(student, tmp_path, config, process=Process(device=device))
    noise, labels = noise_at(3, range(5), (1, 4, 4)), torch.tensor([2, 0, 2, 0, 2])
    expected = student.sample(noise.to(device), labels.to(device))[:, -1]
    assert content["device"] == device.type and np.array_equal(images_of(tmp_path), to_uint8(expected))
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2]


@pytest.mark.usefixtures("pillow")
def test_samples_depend_on_seed_and_index_only(tmp_path, device):
    student, process = student_of(device=device), Process(device=device)
    write_samples(student, tmp_path / "one", SamplingConfig(count=12, batch_size=12), process=process)
    write_samples(student, tmp_path / "other", SamplingConfig(count=9, batch_size=4), process=process)
    write_samples(student, tmp_path / "seed", SamplingConfig(count=9, batch_size=4, seed=1), process=process)
    one, other, seed = (images_of(tmp_path / name) for name in ("one", "other", "seed"))
    assert np.abs(one[:9] - other).max() <= 1  # of 255 grey levels: batches of other sizes round differently
    assert np.abs(other - seed).max() > 10


@pytest.mark.usefixtures("pillow")
def test_latents_are_kept_as_they_are_without_a_decoder(tmp_path, device):
    student = student_of(channels=4, device=device)
    content = write_samples(student, tmp_path, SamplingConfig(count=3), process=Process(device=device))
    stored = load_file(tmp_path / "samples.safetensors")
    noise, labels = noise_at(0, range(3), (4, 4, 4)).to(device), torch.arange(3, device=device)
    assert torch.equal(stored["images"], student.sample(noise, labels)[:, -1].cpu())
    assert stored["labels"].tolist() == [0, 1, 2]
    assert content["file"] == "samples.safetensors" and (tmp_path / "grid.png").exists()
    assert json.loads((tmp_path / "sample.json").read_text()) == content


@pytest.mark.usefixtures("pillow")
def test_decoded_latents_are_images(tmp_path):
    def decode(latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)

    codec = SimpleNamespace(decode=decode, fingerprint="twice", downsampling=2)
    write_samples(student_of(channels=4), tmp_path, SamplingConfig(count=3), codec=codec)
    assert images_of(tmp_path).shape == (3, 8, 8, 3)


FILES = ["grid.png", "sample.json", "samples.npz"]
MANY = SamplingConfig(count=3 * LEAST_SHARD - 5, batch_size=LEAST_SHARD // 4)


def sample(folder: Path, report: Callable, process: Process | None = None) -> None:
    write_samples(student_of(), folder, MANY, process=process, on_progress=report)


def sample_as(rank: int, meeting: Path, folder: Path, report: Callable) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    sample(folder, report, Process(rank, 2))
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("pillow")
def test_two_ranks_write_the_samples_of_one(tmp_path):
    sample(tmp_path / "one", bool)
    children = [Child(sample_as, rank, tmp_path / "meeting", tmp_path / "two") for rank in range(2)]
    assert all(child.kill_after(None)[1] for child in children)
    assert (tmp_path / "one/samples.npz").read_bytes() == (tmp_path / "two/samples.npz").read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES


@pytest.mark.slow
@pytest.mark.usefixtures("pillow")
@pytest.mark.parametrize("every", DEATHS)
def test_a_sampling_that_dies_at_any_change_on_disk_goes_on(tmp_path, every):
    Child(sample, tmp_path / "whole").kill_after(None)
    whole, finished, number, first = (tmp_path / "whole/samples.npz").read_bytes(), False, 0, []
    while not finished:
        folder = tmp_path / str(number)
        _, finished = Child(dying, sample, number, not every, folder).kill_after(None)
        assert finished or not (folder / "sample.json").exists() or (folder / "samples.npz").read_bytes() == whole
        done: list[int] = []
        sample(folder, done.append)
        first.append(done[0])  # what was there before
        assert (folder / "samples.npz").read_bytes() == whole and sum(done) == MANY.count
        assert sorted(path.name for path in folder.iterdir()) == FILES
        number += every or 1
    assert number > (30 if every else 5) and max(first) == MANY.count and first[0] == 0


def test_shards_of_other_samples_are_refused(tmp_path):
    Child(dying, sample, 12, False, tmp_path).kill_after(None)
    with pytest.raises(ValueError, match=r"\.ard-parts holds samples with seed=0; expected 1"):
        write_samples(student_of(), tmp_path, replace(MANY, seed=1))
    other = student_of()
    other.pos_embed.data.add_(1.0)
    with pytest.raises(ValueError, match=r"holds samples with weights_sha256="):
        write_samples(other, tmp_path, MANY)
    sit = ARDStudent(SiTConfig(**{**vars(other.config), "family": "sit"}), **student_of().settings)
    sit.load_state_dict(student_of().state_dict())  # the same weights, walked another way
    with pytest.raises(ValueError, match=r"holds samples with model="):
        write_samples(sit, tmp_path, MANY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("pillow")
def test_finished_samples_stay_as_they_are(tmp_path, monkeypatch):
    folders = [tmp_path / "images", tmp_path / "latents"]
    made = [write_samples(student_of(c), folder, MANY) for c, folder in zip((1, 4), folders, strict=True)]
    monkeypatch.setattr(ARDStudent, "sample", None)
    for channels, folder, content in zip((1, 4), folders, made, strict=True):
        before, done = contents(folder), []
        again = write_samples(student_of(channels), folder, replace(MANY, batch_size=5), on_progress=done.append)
        assert again == content | {"images_per_second": None} and done == [MANY.count]
        for others in ({"seed": 1}, {"count": 7}, {"classes": (1,)}, {"precision": "bf16"}):
            with pytest.raises(ValueError, match=r"holds samples of other settings or weights, .*--fresh"):
                write_samples(student_of(channels), folder, replace(MANY, **others))
        with pytest.raises(ValueError, match="of other settings or weights"):
            write_samples(student_of(5 - channels), folder, MANY)
        assert contents(folder) == before


@pytest.mark.usefixtures("pillow")
def test_fresh_samples_replace_others_finished_or_not(tmp_path):
    few = SamplingConfig(count=5, seed=2)
    write_samples(student_of(), tmp_path / "new", few)
    sample(tmp_path / "finished", bool)
    Child(dying, sample, 12, False, tmp_path / "killed").kill_after(None)
    write_samples(student_of(channels=4), tmp_path / "latents", few)
    for folder in (tmp_path / "finished", tmp_path / "killed", tmp_path / "latents"):
        write_samples(student_of(), folder, few, fresh=True)
        assert contents(folder)["samples.npz"] == contents(tmp_path / "new")["samples.npz"]
        assert sorted(contents(folder)) == FILES


@pytest.mark.usefixtures("pillow")
def test_a_fresh_start_that_was_killed_at_once_loses_nothing(tmp_path):
    """Its empty folder of shards says nothing of what it was to be."""
    few = SamplingConfig(count=5)
    write_samples(student_of(), tmp_path, few)
    (tmp_path / ".ard-parts").mkdir()
    with pytest.raises(ValueError, match="of other settings or weights"):
        write_samples(student_of(), tmp_path, replace(few, seed=1))
    write_samples(student_of(), tmp_path, few)
    assert sorted(contents(tmp_path)) == FILES


@pytest.mark.usefixtures("pillow")
@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_job_is_refused_until_the_last_file_is_written(tmp_path, monkeypatch, fresh):
    def second(path, shown, columns):
        with pytest.raises(ValueError, match="another job is writing to it"):
            write_samples(student_of(), tmp_path, SamplingConfig(count=5, seed=9), fresh=fresh)
        write_grid(path, shown, columns=columns)

    monkeypatch.setattr("ard.diffusion.sampling.write_grid", second)
    write_samples(student_of(), tmp_path, SamplingConfig(count=5))
    assert sorted(contents(tmp_path)) == FILES


@pytest.mark.usefixtures("pillow")
def test_damaged_samples_are_made_again_and_those_of_others_are_not_touched(tmp_path):
    few = SamplingConfig(count=5)
    write_samples(student_of(), tmp_path, few)
    whole = contents(tmp_path)["samples.npz"]
    for damage in (lambda path: path.write_bytes(whole[:-1]), Path.unlink):
        damage(tmp_path / "samples.npz")
        write_samples(student_of(), tmp_path, few)
        assert contents(tmp_path)["samples.npz"] == whole
    (tmp_path / "sample.json").unlink()
    with pytest.raises(ValueError, match="of other settings or weights"):
        write_samples(student_of(), tmp_path, few)
    assert contents(tmp_path)["samples.npz"] == whole


def test_bf16_sampling_stays_near(device):
    student = student_of(device=device)
    noise, labels = noise_at(0, range(4), (1, 4, 4)).to(device), torch.arange(4, device=device) % 3
    exact, rounded = (
        sampler(student, SamplingConfig(4, precision=precision), device)(noise, labels)
        for precision in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_in_a_cuda_graph_are_those_of_the_student(precision, device):
    """On a GPU full batches replay one graph, with other noise and labels; a smaller batch is eager."""
    student = student_of(device=device)
    noise, labels = noise_at(0, range(10), (1, 4, 4)).to(device), torch.arange(10, device=device) % 3
    sample = sampler(student, SamplingConfig(10, batch_size=4, precision=precision), device)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10), slice(0, 4)):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            expected = student.sample(noise[rows], labels[rows])[:, -1].float()
        assert torch.equal(sample(noise[rows], labels[rows]), expected)


def test_classes_are_numbers_and_ranges():
    assert parse_classes("") == () and parse_classes("0,5,10-12") == (0, 5, 10, 11, 12)
    for text in ("a", "1-b", "1.5", ",", "1,", " "):
        with pytest.raises(ValueError, match=r"expected numbers and ranges"):
            parse_classes(text)
    with pytest.raises(ValueError, match=r"expected within \[0, 2\]"):
        Classes(DiTConfig(num_classes=3).conditions).in_turn(range(1), (3,))
    with pytest.raises(ValueError, match=r"count is 0; expected within \[1, "):
        SamplingConfig(0)


@pytest.mark.parametrize("text", ["0-9999999999", "0-999999,0", "9" * 5000, "1000000", "²", "0-" * 3000, "-1"])
def test_classes_beyond_any_model_are_refused_before_they_are_listed(text):
    started = time.process_time()
    with pytest.raises(ValueError, match=r"classes: got .*; expected") as refused:
        parse_classes(text)
    assert len(str(refused.value)) < 200 and time.process_time() - started < 1.0
