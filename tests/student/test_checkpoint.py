"""Strict loading, sizes from tensors, bit-exact round trips, refusal of pickles, atomic writes."""

import argparse
import os

import pytest
import torch
from ard import ARDStudent, DiT, DiTConfig
from ard.models.families import config_class, make_teacher
from ard.storage.files import write_tensors
from ard.weights.opened import open_source
from ard.weights.public import load_student, load_teacher, read_state
from safetensors.torch import load_file, save_file

CONFIGS = {
    "sigma": DiTConfig(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=7),
    "no-sigma": DiTConfig(
        input_size=12,
        patch_size=4,
        in_channels=1,
        hidden_size=24,
        depth=2,
        num_heads=3,
        mlp_ratio=55 / 24,
        num_classes=3,
        learn_sigma=False,
        frequency_embedding_size=64,
    ),
}


def teacher_of(name="sigma"):
    torch.manual_seed(0)
    teacher = DiT(CONFIGS[name])
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return teacher


def assert_same_weights(actual, expected):
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        loaded = actual.state_dict()[name]
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_round_trips_bit_exactly(tmp_path, name, dtype):
    teacher = teacher_of(name).to(dtype)
    write_tensors(tmp_path / "teacher.safetensors", teacher.state_dict())
    loaded = load_teacher(tmp_path / "teacher.safetensors", num_heads=CONFIGS[name].num_heads)
    assert_same_weights(loaded, teacher)
    assert loaded.config.mlp_hidden_size == teacher.config.mlp_hidden_size
    sizes = (
        "input_size",
        "patch_size",
        "in_channels",
        "depth",
        "num_classes",
        "learn_sigma",
        "frequency_embedding_size",
    )
    assert all(getattr(loaded.config, size) == getattr(teacher.config, size) for size in sizes)
    assert not loaded.training and not loaded.pos_embed.requires_grad and loaded.blocks[0].mlp.fc1.weight.requires_grad
    write_tensors(tmp_path / "again.safetensors", loaded.state_dict())
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "teacher.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["dit", "sit", "repa", "lightningdit"])
def test_positions_must_be_those_of_the_grid(family):
    sizes = {"hidden_size": 48, "depth": 1, "num_heads": 2, "num_classes": 3, "mlp_ratio": 4.0}
    state = make_teacher(config_class({"family": family})(input_size=(8, 12), patch_size=2, **sizes)).state_dict()
    how = {"num_heads": 2, "family": family}
    load_teacher(state, input_size=(8, 12), **how)
    average = state["pos_embed"].clone()
    for _ in range(3000):  # as DiT's trainer averages all parameters
        average.mul_(0.9999).add_(state["pos_embed"], alpha=1 - 0.9999)
    assert (average - state["pos_embed"]).abs().max() > 1e-5
    load_teacher(state | {"pos_embed": average}, input_size=(8, 12), **how)
    with pytest.raises(ValueError, match=r"pos_embed differs by 1\.\d+ from that of \(6, 4\) tokens"):
        load_teacher(state, input_size=(12, 8), **how)
    for damaged in (torch.zeros(1, 24, 48), state["pos_embed"] * float("nan")):
        with pytest.raises(ValueError, match="pos_embed differs by"):
            load_teacher(state | {"pos_embed": damaged}, input_size=(8, 12), **how)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_student_round_trips_and_samples_the_same(tmp_path, steps):
    student = ARDStudent.from_teacher(teacher_of(), steps=steps, history_layers=2, window=2, sink=1).eval()
    write_tensors(tmp_path / "student.safetensors", student.state_dict())
    loaded = load_student(tmp_path / "student.safetensors", num_heads=4, history_layers=2, window=2, sink=1)
    assert loaded.steps == steps
    assert_same_weights(loaded, student)
    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 6])
    assert torch.equal(loaded.sample(noise, labels), student.sample(noise, labels))


@pytest.mark.parametrize("nesting", [None, "ema", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pt_files_with_and_without_nesting(tmp_path, nesting, suffix):
    teacher = teacher_of()
    state = teacher.state_dict()
    content = state if nesting is None else {nesting: state, "steps": 3}
    torch.save(content, tmp_path / f"teacher{suffix}")
    assert_same_weights(load_teacher(tmp_path / f"teacher{suffix}", num_heads=4), teacher)


def test_ema_is_preferred_unless_the_model_is_asked_for(tmp_path):
    ema, model = teacher_of(), DiT(CONFIGS["sigma"])
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "both.pt")
    save_file(model.state_dict(), tmp_path / "flat.safetensors")
    for weights, expected in (("ema", ema), ("model", model)):
        state = open_source(tmp_path / "both.pt", weights).state
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    with pytest.raises(ValueError, match=r"flat\.safetensors has no 'model' beside other weights"):
        open_source(tmp_path / "flat.safetensors", "model")
    assert_same_weights(load_teacher(str(tmp_path / "both.pt"), num_heads=4), ema)


def test_a_state_dict_is_copied():
    teacher = teacher_of()
    state = teacher.state_dict()
    loaded = load_teacher(state, num_heads=4)
    with torch.no_grad():
        loaded.pos_embed.zero_()
    assert state["pos_embed"].any()


def test_oblong_grid_needs_its_size():
    teacher = DiT(DiTConfig(input_size=(4, 6), hidden_size=32, depth=1, num_heads=2, num_classes=2))
    with pytest.raises(ValueError, match=r"pos_embed has 6 tokens, not a square grid; give input_size"):
        load_teacher(teacher.state_dict(), num_heads=2)
    assert load_teacher(teacher.state_dict(), num_heads=2, input_size=(4, 6)).config.grid_hw == (2, 3)
    with pytest.raises(ValueError, match=r"pos_embed: expected \(1, 8, 32\)"):
        load_teacher(teacher.state_dict(), num_heads=2, input_size=(4, 8))


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: without(s, "pos_embed"), r"missing keys pos_embed"),
        (lambda s: without(s, "blocks.1.attn.qkv.bias"), r"load_teacher: missing keys blocks\.1\.attn\.qkv\.bias"),
        (lambda s: {**s, "extra": torch.zeros(1)}, r"unexpected keys extra"),
        (
            lambda s: {**s, "blocks.2.mlp.fc2.weight": torch.zeros(3, 3)},
            r"blocks\.2\.mlp\.fc2\.weight: expected \(32, 128\) floating point, got \(3, 3\)",
        ),
        (lambda s: {**s, "pos_embed": s["pos_embed"].long()}, r"pos_embed: expected .* floating point, got .*int64"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][0]}, r"pos_embed has shape \(16, 32\); expected 3 dimensions"),
        (lambda s: {**s, "final_layer.linear.weight": torch.zeros(5, 32)}, r"has 5 rows; expected 16 .* or 32"),
        (lambda s: {**s, "args": "lr=1"}, r"entries that are not tensors: args"),
    ],
)
def test_wrong_states_are_refused_by_name(edit, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(edit(teacher_of().state_dict()), num_heads=4)


def test_a_gap_in_the_final_layers_is_refused():
    state = ARDStudent.from_teacher(teacher_of(), steps=3, history_layers=1).state_dict()
    gap = {name: tensor for name, tensor in state.items() if not name.startswith("final_layer2.")}
    with pytest.raises(ValueError, match=r"load_student: missing keys final_layer2\.adaLN_modulation\.1\.weight"):
        load_student(gap, num_heads=4, history_layers=1)
    with pytest.raises(ValueError, match=r"load_teacher: unexpected keys final_layer2"):
        load_teacher(state, num_heads=4)


class RunsOnLoad:
    def __reduce__(self):
        return os.mkdir, ("must-not-appear",)


@pytest.mark.parametrize("content", [argparse.Namespace(lr=1), RunsOnLoad()], ids=["namespace", "code"])
def test_pickles_are_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": teacher_of().state_dict(), "args": content}, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"'teacher.pt' holds more than tensors"):
        load_teacher(tmp_path / "teacher.pt", num_heads=4)
    assert not (tmp_path / "must-not-appear").exists()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got 'teacher.bin'; expected a .safetensors, .pt or .pth file"):
        load_teacher(tmp_path / "teacher.bin", num_heads=4)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"'list.pt' holds a list; expected a state dict"):
        load_teacher(tmp_path / "list.pt", num_heads=4)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    teacher = teacher_of()
    write_tensors(path, teacher.state_dict())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, DiT(CONFIGS["sigma"]).state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher.safetensors"]
    assert torch.equal(load_file(path)["pos_embed"], teacher.pos_embed)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_file_of_torch_save_is_refused_by_name(tmp_path, legacy):
    path = tmp_path / "t.pt"
    torch.save({"a": torch.zeros(9)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in (*range(0, 200, 7), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"t\.pt"):
            read_state(path)
    path.write_bytes(content)
    assert torch.equal(read_state(path)["a"], torch.zeros(9))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100])
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.safetensors is not a whole safetensors file"):
        read_state(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(1).expand(1 << 34), r"t\.pt has tensors of 68719476736 bytes; expected at most the file's"),
        (torch.empty(1 << 40, device="meta"), r"t\.pt has names or tensors of an odd kind: a"),
        (torch.eye(3).to_sparse(), r"t\.pt has names or tensors of an odd kind: a"),
    ],
)
def test_tensors_larger_than_their_file_are_refused(tmp_path, value, message):
    torch.save({"a": value}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "t.pt")


@pytest.mark.parametrize("name", ["blocks.300000.x", f"blocks.{'9' * 5000}.x", "final_layer500000.x"])
def test_a_name_does_not_make_a_model_deep(name, monkeypatch):
    state = {**ARDStudent.from_teacher(teacher_of(), steps=2, history_layers=1).state_dict(), name: torch.zeros(1)}
    monkeypatch.setattr(ARDStudent, "__init__", lambda *_, **__: pytest.fail("was built"))
    with pytest.raises(ValueError, match=r"a tensor is named .*; expected at most 1000"):
        load_student(state, num_heads=4, history_layers=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pos_embed": torch.zeros(1, 1 << 40, 0)}, r"pos_embed has shape .*; expected elements"),
        ({"y_embedder.embedding_table.weight": torch.zeros(1 << 60, 0)}, r"expected elements"),
        ({"pos_embed": torch.zeros(1, 1 << 16, 1)}, r"pos_embed has 1 channels; expected 32"),
    ],
)
def test_sizes_that_no_tensor_bears_out_are_refused(changes, message, monkeypatch):
    state = {**teacher_of().state_dict(), **changes}
    monkeypatch.setattr(DiT, "__init__", lambda *_: pytest.fail("was built"))
    with pytest.raises(ValueError, match=message):
        load_teacher(state, num_heads=4)
