"""Sharded stores: deterministic content, mapped reads, found damage, and the order in which training visits samples."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ard.common.streams import STREAMS, batch_indices, noise_at, random_stream
from ard.data.latents import LatentSpec, LatentStore, write_latents
from ard.data.trajectories import TrajectoryStore, generate_store
from ard.models.config import Condition
from ard.storage.files import DamagedFile, read_sealed_json, write_sealed_json
from ard.storage.shards import MANIFEST_NAME
from fault_runs import SPEC as INDEXED
from fault_runs import damages, rewrite, snapshot, trajectories

SPEC = replace(INDEXED, conditions=(Condition("labels", classes=10),))
SHARD_NAMES = [f"shard-{shard:05d}.safetensors" for shard in range(3)]


class FakeTeacher:
    """`trajectories`; counts the rows it makes, and is interrupted when it has made ``fail_after``."""

    def __init__(self, fail_after: int | None = None):
        self.rows, self.fail_after = 0, fail_after

    def __call__(self, noise, labels):
        self.rows += len(labels)
        if self.fail_after is not None and self.rows > self.fail_after:
            raise KeyboardInterrupt
        return trajectories(noise, labels)


def test_noise_depends_on_seed_and_index_only():
    together = noise_at(5, range(10), (2, 3))
    assert torch.equal(together[7:8], noise_at(5, [7], (2, 3)))
    assert torch.equal(together[[4, 1]], noise_at(5, [4, 1], (2, 3)))
    assert not torch.equal(together, noise_at(6, range(10), (2, 3)))
    assert together.dtype == torch.float32
    streams = [random_stream(5, stream).standard_normal() for stream in STREAMS]
    assert len(set(streams)) == len(streams)


def test_noise_is_standard_normal_and_rows_differ():
    noise = noise_at(0, range(4000), (1, 8, 8)).double()
    assert abs(float(noise.mean())) < 5 / (4000 * 64) ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / (4000 * 64)) ** 0.5
    assert len(torch.unique(noise[:, 0, 0, 0])) == 4000


def test_random_stream_refuses_unknown_stream_and_negative_index():
    with pytest.raises(ValueError, match=r"stream is 'nose'; expected one of"):
        random_stream(0, "nose")
    with pytest.raises(ValueError, match=r"index=-1; expected both >= 0"):
        random_stream(0, "noise", -1)


@pytest.mark.parametrize("batch_size", [1, 5, 7, 40])
def test_batch_order_is_one_stream_whatever_the_batch_size(batch_size):
    count, total = 17, 3 * 17
    stream = torch.cat([batch_indices(2, step, batch_size, count) for step in range(-(-total // batch_size))])[:total]
    assert torch.equal(stream, torch.cat([batch_indices(2, p, 1, count) for p in range(total)]))
    for epoch in stream.view(3, count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert not torch.equal(stream[:count], stream[count : 2 * count])


def test_store_holds_the_same_values_for_any_batch_and_shard_size(tmp_path):
    one = generate_store(tmp_path / "one", SPEC, FakeTeacher(), batch_size=3)
    other = generate_store(tmp_path / "other", replace(SPEC, shard_size=100), FakeTeacher(), batch_size=64)
    for name in ("noise", "x0", "ode", "labels"):
        assert torch.equal(one.read(name, torch.arange(23)), other.read(name, torch.arange(23)))
    assert sorted(path.name for path in one.folder.iterdir()) == [MANIFEST_NAME, *SHARD_NAMES]


def test_reads_keep_the_asked_order_across_shards(tmp_path):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    indices = torch.tensor([22, 0, 8, 7, 8])
    assert torch.equal(store.read("noise", indices), noise_at(3, indices.tolist(), (1, 4, 4)))
    assert store.read("labels", indices).tolist() == [2, 0, 8, 7, 8]


@pytest.mark.parametrize("state", ["x0", "ode"])
def test_pairs_are_noise_then_states_against_next_states(tmp_path, state):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    indices = torch.tensor([3, 20])
    states, targets, (labels,) = store.pairs(indices, state)
    assert torch.equal(states[:, 0], store.read("noise", indices))
    assert torch.equal(states[:, 1:], targets[:, :-1])
    assert torch.equal(targets, store.read(state, indices))
    assert torch.equal(labels, torch.tensor([3, 0]))


def test_killed_generation_resumes_with_the_missing_shards(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_store(tmp_path / "killed", SPEC, FakeTeacher(fail_after=12), batch_size=4)
    with pytest.raises(ValueError, match=r"2 of 3 shards of trajectories are missing, first shard-00001"):
        TrajectoryStore(tmp_path / "killed")
    teacher, finished = FakeTeacher(), []
    resumed = generate_store(tmp_path / "killed", SPEC, teacher, batch_size=4, on_progress=finished.append)
    assert teacher.rows == 15 and sum(finished) == 23
    whole = generate_store(tmp_path / "whole", SPEC, FakeTeacher(), batch_size=4)
    assert resumed.shards == whole.shards
    assert torch.equal(resumed.read("x0", torch.arange(23)), whole.read("x0", torch.arange(23)))


def test_finished_store_is_not_generated_again(tmp_path):
    generate_store(tmp_path, SPEC, FakeTeacher())
    teacher = FakeTeacher()
    generate_store(tmp_path, SPEC, teacher)
    assert teacher.rows == 0


def test_another_spec_is_refused(tmp_path):
    generate_store(tmp_path, SPEC, FakeTeacher())
    with pytest.raises(ValueError, match=r"holds trajectories with cfg_scale=1.5; expected 2.0"):
        generate_store(tmp_path, replace(SPEC, cfg_scale=2.0), FakeTeacher())


def test_another_kind_of_store_is_refused(tmp_path):
    generate_store(tmp_path, SPEC, FakeTeacher())
    with pytest.raises(ValueError, match=r"says format='ard-trajectories', version=3; expected 'ard-latents', 3"):
        LatentStore(tmp_path)


def test_only_the_states_asked_for_are_kept(tmp_path):
    store = generate_store(tmp_path, replace(SPEC, store=("x0",)), FakeTeacher())
    assert sorted(store.names) == ["labels", "noise", "x0"]
    assert store.pairs(torch.tensor([1]), "x0")[1].shape == (1, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"state is 'ode'; expected one of \('x0',\)"):
        store.pairs(torch.tensor([1]), "ode")
    with pytest.raises(ValueError, match=r"store=\['x1'\]; expected one or both of"):
        replace(SPEC, store=("x1",))
    with pytest.raises(ValueError, match=r"store=\[\]; expected one or both of"):
        replace(SPEC, store=())


def test_half_precision_rounds_once_and_halves_the_files(tmp_path):
    half = generate_store(tmp_path / "half", replace(SPEC, dtype="float16"), FakeTeacher())
    full = generate_store(tmp_path / "full", SPEC, FakeTeacher())
    for name in ("noise", "x0", "ode"):
        assert torch.equal(half.read(name, torch.arange(23)), full.read(name, torch.arange(23)).half())
    for store in (half, full):
        tensors = sum(store.read(name, torch.arange(23)).nbytes for name in store.names)
        assert tensors == 23 * store.spec.row_bytes


@pytest.mark.parametrize("dtype, value", [("float16", 7e4), ("float32", float("nan")), ("float32", float("inf"))])
def test_states_that_are_not_finite_are_refused_naming_the_range(tmp_path, dtype, value):
    def broken(noise, labels):
        batch = trajectories(noise, labels)
        batch.x0[labels == 9] = value
        return batch

    with pytest.raises(ValueError, match=rf"x0 of the trajectories 8 to 11 are not finite as {dtype}"):
        generate_store(tmp_path, replace(SPEC, dtype=dtype), broken, batch_size=4)
    assert not (tmp_path / SHARD_NAMES[1]).exists()
    assert generate_store(tmp_path, replace(SPEC, dtype=dtype), FakeTeacher()).shards.keys() == set(SHARD_NAMES)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 23 * SPEC.row_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    teacher = FakeTeacher()
    with pytest.raises(OSError, match=r"KiB are still to be written; expected at most the .* KiB that are free"):
        generate_store(tmp_path / "store", SPEC, teacher)
    assert teacher.rows == 0 and not (tmp_path / "store").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    generate_store(tmp_path / "store", SPEC, FakeTeacher())
    (tmp_path / "store" / SHARD_NAMES[2]).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 7 * SPEC.row_bytes))
    generate_store(tmp_path / "store", SPEC, FakeTeacher())  # the last shard alone


def test_shards_of_an_unknown_spec_are_not_touched(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_store(tmp_path, SPEC, FakeTeacher(fail_after=12), batch_size=4)
    (tmp_path / MANIFEST_NAME).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"holds shard-00000.json and no manifest.json; expected a store or a new"):
        generate_store(tmp_path, replace(SPEC, seed=8), FakeTeacher())
    assert snapshot(tmp_path) == before


def test_files_of_others_with_names_like_ours_stay(tmp_path):
    """The user's own notes beside the shards, and a symlink with the prefix of our temporary folders."""
    with pytest.raises(KeyboardInterrupt):
        generate_store(tmp_path / "store", SPEC, FakeTeacher(fail_after=12), batch_size=4)
    (tmp_path / "elsewhere").mkdir()
    theirs = [tmp_path / "store" / name for name in ("shard-notes.json", ".tmp-notes", ".tmpAb3dE6")]
    for path in theirs:
        path.write_text("mine")
    theirs.append(tmp_path / "store/.ard-tmp-link")
    theirs[-1].symlink_to(tmp_path / "elsewhere")
    generate_store(tmp_path / "store", SPEC, FakeTeacher())
    assert all(path.exists() for path in theirs) and theirs[-1].is_symlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished store; not to be changed."""
    return generate_store(tmp_path_factory.mktemp("store"), SPEC, FakeTeacher()).folder


@pytest.mark.parametrize(
    "name",
    [
        MANIFEST_NAME,
        SHARD_NAMES[0],
        pytest.param(SHARD_NAMES[1], marks=pytest.mark.exhaustive),
        pytest.param(SHARD_NAMES[2], marks=pytest.mark.slow),  # shorter than the others
    ],
)
def test_every_flipped_bit_and_cut_is_found(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "store")
    path, content = tmp_path / "store" / name, (finished / name).read_bytes()
    for damaged in damages(content):
        rewrite(path, damaged)
        with pytest.raises(DamagedFile, match=name):
            TrajectoryStore(path.parent).verify()
    path.write_bytes(content)
    TrajectoryStore(path.parent).verify()


@pytest.mark.parametrize("name", [MANIFEST_NAME, *SHARD_NAMES])
def test_a_missing_file_is_named(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        TrajectoryStore(tmp_path / "store")


def test_all_damaged_shards_are_named_and_made_again_when_removed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "store")
    broken = [tmp_path / "store" / SHARD_NAMES[shard] for shard in (0, 2)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DamagedFile, match=r"sha256 differs from the manifest for .*00000.safetensors, .*00002"):
        TrajectoryStore(tmp_path / "store").verify()
    broken[0].unlink()
    broken[1].write_bytes(b"cut")
    teacher = FakeTeacher()
    generate_store(tmp_path / "store", SPEC, teacher).verify()
    assert teacher.rows == 8 + 7 and snapshot(tmp_path / "store") == snapshot(finished)


def test_damaged_header_is_found_by_reading_or_changes_no_value(finished, tmp_path):
    def values(folder: Path) -> list[torch.Tensor]:
        store = TrajectoryStore(folder)
        return [store.read(name, torch.arange(23)) for name in store.names]

    shutil.copytree(finished, tmp_path / "store")
    path, expected = tmp_path / "store" / SHARD_NAMES[1], values(finished)
    content = path.read_bytes()
    header, found = 8 + int.from_bytes(content[:8], "little"), 0
    for damaged in itertools.islice(damages(content), header):
        rewrite(path, damaged)
        try:
            assert all(torch.equal(*pair) for pair in zip(values(path.parent), expected, strict=True))
        except DamagedFile:
            found += 1
    assert found > header / 2


def test_damaged_json_of_a_shard_means_that_the_shard_is_made_again(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_store(tmp_path, SPEC, FakeTeacher(fail_after=20), batch_size=4)
    path = tmp_path / "shard-00000.json"
    path.write_bytes(path.read_bytes()[:-2])
    teacher = FakeTeacher()
    generate_store(tmp_path, SPEC, teacher)
    assert teacher.rows == 8 + 7 and snapshot(tmp_path) == snapshot(finished)


def test_bad_reads_and_foreign_folders_are_refused(finished, tmp_path):
    store = TrajectoryStore(finished)
    with pytest.raises(IndexError, match=r"span \[0, 23\]; expected within \[0, 22\]"):
        store.read("x0", torch.tensor([0, 23]))
    with pytest.raises(ValueError, match=r"asked for 'x1'; expected one of"):
        store.read("x1", torch.tensor([0]))
    with pytest.raises(ValueError, match=r"state is 'noise'; expected one of"):
        store.pairs(torch.tensor([0]), "noise")
    with pytest.raises(FileNotFoundError, match=r"expected a folder of trajectories"):
        TrajectoryStore(tmp_path / "nowhere")
    manifest = read_sealed_json(finished / MANIFEST_NAME)
    write_sealed_json(tmp_path / MANIFEST_NAME, {**manifest, "version": 99})
    with pytest.raises(ValueError, match=r"version=99; expected 'ard-trajectories', 3"):
        TrajectoryStore(tmp_path)


def test_latents_are_stored_in_order_and_resumed(tmp_path):
    spec = LatentSpec(10, 4, (2, 3, 3), (Condition("labels", classes=5),), source="test", encoder="none")
    latents, labels, made = torch.randn(10, 2, 3, 3), torch.arange(10) % 5, []

    def encode(indices: range) -> tuple[torch.Tensor, torch.Tensor]:
        made.extend(indices)
        if made == list(range(6)):
            raise KeyboardInterrupt
        return latents[indices.start : indices.stop], labels[indices.start : indices.stop]

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path, spec, encode, batch_size=1)
    made.clear()
    store = write_latents(tmp_path, spec, encode, batch_size=8)
    assert made == list(range(4, 10)) and store.spec == spec
    order = torch.randperm(10)
    assert torch.equal(store.read("latents", order), latents[order])
    assert torch.equal(store.read("labels", order), labels[order])
    store.verify()


def test_states_that_no_teacher_step_has_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"keep: got \(0, 15\); expected strictly descending"):
        generate_store(tmp_path / "store", replace(SPEC, keep=(0, 15)), FakeTeacher())
    assert not (tmp_path / "store").exists()


def edited(finished: Path, folder: Path, edit) -> Path:
    """A copy of the store whose manifest was changed by someone who can compute a sha256."""
    shutil.copytree(finished, folder)
    manifest = read_sealed_json(folder / MANIFEST_NAME)
    edit(manifest)
    write_sealed_json(folder / MANIFEST_NAME, manifest)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 1 << 50}, r"count is 1125899906842624; expected 1 to"),
        ({"count": 1 << 39}, r"'shard-00002\.safetensors' is .*; expected a shard of the spec"),
        ({"count": 1 << 39, "shard_size": 1}, r"'shard-00000\.safetensors' is .*; expected a shard of the spec"),
        ({"count": 24}, r"'shard-00002\.safetensors' is .*; expected a shard of the spec"),
        ({"count": 22}, r"'shard-00002\.safetensors' is .*; expected a shard of the spec"),
        ({"count": 16}, r"'shard-00002\.safetensors' is .*; expected a shard of the spec"),
        ({"count": "23"}, r"count is '23'; expected 1 to"),
        ({"count": True}, r"count is True; expected 1 to"),
        ({"shard_size": 0}, r"shard_size is 0; expected 1 to"),
        ({"keep": 3}, r"the spec is none \(config: keep is 3; expected a list\)"),
        ({"image_shape": [1, 4, "4"]}, r"the spec is none \(config: image_shape\[2\] is '4'"),
        ({"image_shape": [1, 4, 0]}, r"noise is of \[1, 4, 0\]; expected sizes of at least 1"),
        ({"conditions": [{"name": "noise"}]}, r"the spec is none \(Condition: name is 'noise'; expected a plain name"),
        ({"conditions": [{"name": "a"}, {"name": "a"}]}, r"the spec is none \(conditions: got \['a', 'a'\]"),
        ({"conditions": [{"name": "a", "dtype": "O"}]}, r"the spec is none \(Condition: dtype is 'O'"),
        ({"conditions": [{"name": "a", "shape": [0]}]}, r"the spec is none \(Condition: a has classes=0, shape=\(0,\)"),
        ({"more": 1}, r"the spec is none \(config: unknown key 'more'"),
        ({"image_shape": [1, 4, 5]}, r"shard-00000\.safetensors holds .*; expected .*\(8, 1, 4, 5\).* as 2 more are"),
        ({"dtype": "float16"}, r"shard-00000\.safetensors holds 'labels' .*; expected 'noise' float16"),
        (
            {"conditions": [{"name": "labels", "classes": 9}]},
            r"shard-00001\.safetensors: labels span \[0, 9\]; expected within \[0, 8\]",
        ),
    ],
)
def test_a_manifest_is_compared_with_the_shards(finished, tmp_path, changes, message):
    folder = edited(finished, tmp_path / "store", lambda manifest: manifest["spec"].update(changes))
    with pytest.raises(DamagedFile, match=message):
        TrajectoryStore(folder).verify()


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "shard-00003.safetensors", "shard-000000.safetensors", ""])
def test_only_shards_of_the_spec_are_opened(finished, tmp_path, name, monkeypatch):
    def edit(manifest):
        manifest["shards"][name] = manifest["shards"][SHARD_NAMES[2]]

    (tmp_path / "secret").write_bytes(b"secret")
    folder = edited(finished, tmp_path / "store", edit)
    monkeypatch.setattr("ard.storage.shards.file_sha256", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(DamagedFile, match=r"expected a shard of the spec"):
        TrajectoryStore(folder).verify()


@pytest.mark.parametrize(
    "value", [[], 1, None, {"first": 0}, {"first": 0, "count": 8, "bytes": 1, "content_sha256": 2}]
)
def test_entries_of_another_kind_are_refused_and_made_again(finished, tmp_path, value):
    folder = edited(finished, tmp_path / "store", lambda manifest: manifest["shards"].update({SHARD_NAMES[0]: value}))
    with pytest.raises(DamagedFile, match=r"'shard-00000\.safetensors' is .*; expected a shard of the spec"):
        TrajectoryStore(folder)
    teacher = FakeTeacher()
    generate_store(folder, SPEC, teacher).verify()
    assert teacher.rows == 8
    for name in ("spec", "shards"):
        odd = edited(finished, tmp_path / name, lambda manifest, name=name: manifest.update({name: value or []}))
        with pytest.raises(DamagedFile, match=name):
            TrajectoryStore(odd)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_shard_is_a_regular_file(finished, tmp_path, kind):
    path = shutil.copytree(finished, tmp_path / "store") / SHARD_NAMES[1]
    path.unlink()
    path.symlink_to(finished / SHARD_NAMES[1]) if kind == "link" else os.mkfifo(path)
    with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors is no regular file"):
        TrajectoryStore(path.parent)
