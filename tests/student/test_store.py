"""The trajectory store: deterministic content, crash-safe writing, mapped reads, and the training order."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ard.files import atomic_path, write_json
from ard.store import (
    MANIFEST_NAME,
    StoreSpec,
    TrajectoryStore,
    batch_indices,
    generate_store,
    noise_at,
    random_stream,
)

SPEC = StoreSpec(
    count=23,
    shard_size=8,
    seed=3,
    image_shape=(1, 4, 4),
    num_classes=10,
    sampling_steps=25,
    keep=(15, 10, 0),
    cfg_scale=1.5,
    cfg_channels=1,
)


class FakeTeacher:
    """Trajectories that are a function of the noise row alone; counts the rows it makes."""

    def __init__(self, fail_after: int | None = None):
        self.rows, self.fail_after = 0, fail_after

    def __call__(self, noise, labels):
        self.rows += len(labels)
        if self.fail_after is not None and self.rows > self.fail_after:
            raise KeyboardInterrupt
        scales = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
        return SimpleNamespace(noise=noise, x0=noise[:, None] * scales, ode=noise[:, None] + scales, labels=labels)


def test_noise_depends_on_seed_and_index_only():
    together = noise_at(5, range(10), (2, 3))
    assert torch.equal(together[7:8], noise_at(5, [7], (2, 3)))
    assert torch.equal(together[[4, 1]], noise_at(5, [4, 1], (2, 3)))
    assert not torch.equal(together, noise_at(6, range(10), (2, 3)))
    assert together.dtype == torch.float32


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
    assert sorted(path.name for path in one.folder.iterdir()) == [
        MANIFEST_NAME,
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]


def test_reads_keep_the_asked_order_across_shards(tmp_path):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    indices = torch.tensor([22, 0, 8, 7, 8])
    assert torch.equal(store.read("noise", indices), noise_at(3, indices.tolist(), (1, 4, 4)))
    assert store.read("labels", indices).tolist() == [2, 0, 8, 7, 8]


@pytest.mark.parametrize("state", ["x0", "ode"])
def test_pairs_are_noise_then_states_against_next_states(tmp_path, state):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    indices = torch.tensor([3, 20])
    states, targets, labels = store.pairs(indices, state)
    assert torch.equal(states[:, 0], store.read("noise", indices))
    assert torch.equal(states[:, 1:], targets[:, :-1])
    assert torch.equal(targets, store.read(state, indices))
    assert torch.equal(labels, torch.tensor([3, 0]))


def test_killed_generation_resumes_with_the_missing_shards(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_store(tmp_path / "killed", SPEC, FakeTeacher(fail_after=12), batch_size=4)
    with pytest.raises(ValueError, match=r"lacks 2 of 3 shards, first shard-00001"):
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


def test_verify_names_the_damaged_shard(tmp_path):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    store.verify()
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256 differs from the manifest for shard-00001.safetensors"):
        store.verify()


def test_bad_reads_and_foreign_folders_are_refused(tmp_path):
    store = generate_store(tmp_path, SPEC, FakeTeacher())
    with pytest.raises(IndexError, match=r"span \[0, 23\]; expected within \[0, 22\]"):
        store.read("x0", torch.tensor([0, 23]))
    with pytest.raises(ValueError, match=r"name is 'x1'; expected one of"):
        store.read("x1", torch.tensor([0]))
    with pytest.raises(ValueError, match=r"state is 'noise'; expected 'x0' or 'ode'"):
        store.pairs(torch.tensor([0]), "noise")
    with pytest.raises(FileNotFoundError, match=r"expected a trajectory store"):
        TrajectoryStore(tmp_path / "nowhere")
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_text())
    write_json(tmp_path / MANIFEST_NAME, {**manifest, "version": 99})
    with pytest.raises(ValueError, match=r"version=99; expected 'ard-trajectories', 1"):
        TrajectoryStore(tmp_path)


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError):
        write_json(path, {"value": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]
