"""The training loop: reproducible, guarded against non-finite values, and able to learn."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from ard.config import build, merge
from ard.ema import Ema
from ard.files import file_sha256
from ard.model import DiT, DiTConfig
from ard.store import StoreSpec, generate_store
from ard.student import ARDStudent
from ard.train import NonFiniteError, TrainConfig, fit, save_checkpoint, student_step_loss, teacher_step_loss
from safetensors.torch import load_file
from torch import nn

CONFIG = DiTConfig(
    input_size=4,
    patch_size=2,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
)


def tiny_teacher(seed: int = 0, **changes) -> DiT:
    torch.manual_seed(seed)
    return DiT(DiTConfig(**{**vars(CONFIG), **changes}))


def images_and_labels(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    return (labels.float() - 1).view(-1, 1, 1, 1).expand(count, 1, 4, 4).contiguous(), labels


def tiny_store(folder):
    spec = StoreSpec(30, 16, 0, (1, 4, 4), 3, sampling_steps=25, keep=(15, 5, 0), cfg_scale=1.0, cfg_channels=1)

    def contract(noise, labels):
        """A trajectory that shrinks the noise towards the label: predictable from noise and label."""
        end = (labels.float() - 1).view(-1, 1, 1, 1)
        states = torch.stack([noise * (1 - f) + end * f for f in (0.3, 0.6, 1.0)], dim=1)
        return SimpleNamespace(noise=noise, x0=states, ode=-states, labels=labels)

    return generate_store(folder, spec, contract)


def fit_student(store, history_layers=1, seed=0, **changes):
    student = ARDStudent.from_teacher(tiny_teacher(), steps=3, history_layers=history_layers)
    config = TrainConfig(
        **{"steps": 60, "batch_size": 8, "learning_rate": 3e-3, "seed": seed, "log_every": 20, **changes}
    )
    return student, fit(student, student_step_loss(student, store, config, "x0"), config)


def test_teacher_loss_falls_and_log_is_written(tmp_path):
    teacher, (images, labels) = tiny_teacher(), images_and_labels()
    config = TrainConfig(steps=150, batch_size=32, learning_rate=3e-3, log_every=50)
    steps = []
    fitted = fit(
        teacher,
        teacher_step_loss(teacher, images, labels, config, label_dropout=0.1),
        config,
        log_path=tmp_path / "log.jsonl",
        on_step=lambda: steps.append(1),
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == fitted.log and [line["step"] for line in lines] == [50, 100, 150]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert len(steps) == 150


def test_teacher_trains_its_first_channels_only_when_it_has_sigma():
    teacher, (images, labels) = tiny_teacher(learn_sigma=True), images_and_labels()
    config = TrainConfig(steps=1, batch_size=4)
    loss, indices = teacher_step_loss(teacher, images, labels, config, label_dropout=0.0)(0)
    loss.backward()
    rows = teacher.final_layer.linear.bias.grad.view(2, 2, 2)  # patch row, patch column, channel
    assert rows[..., 0].abs().sum() > 0 and rows[..., 1].abs().sum() == 0
    assert indices.shape == (4,)


def test_label_dropout_uses_the_null_row():
    teacher, (images, labels) = tiny_teacher(), images_and_labels()
    nn.init.normal_(teacher.final_layer.linear.weight)  # zero at the start: no gradient would reach the labels
    nn.init.normal_(teacher.final_layer.adaLN_modulation[1].weight)
    for dropout, touched in ((0.0, [True, True, True, False]), (1.0, [False, False, False, True])):
        teacher.zero_grad()
        config = TrainConfig(steps=1, batch_size=12)
        teacher_step_loss(teacher, images, labels, config, label_dropout=dropout)(0)[0].backward()
        assert (teacher.y_embedder.embedding_table.weight.grad.abs().sum(1) > 0).tolist() == touched


def test_runs_are_reproducible_and_seeds_differ(tmp_path):
    store = tiny_store(tmp_path)
    (first, first_fit), (again, again_fit), (other, _) = (fit_student(store, seed=seed) for seed in (0, 0, 1))
    assert first_fit.log == again_fit.log
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(first_fit.ema.state[name], again_fit.ema.state[name])
    assert not torch.equal(first.final_layer.linear.weight, other.final_layer.linear.weight)


def test_students_with_and_without_history_see_the_same_batches(tmp_path):
    store = tiny_store(tmp_path)
    config = TrainConfig(steps=5, batch_size=8, seed=4)
    orders = []
    for layers in (0, 2):
        student = ARDStudent.from_teacher(tiny_teacher(), steps=3, history_layers=layers)
        step_loss = student_step_loss(student, store, config, "x0")
        orders.append([step_loss(step)[1].tolist() for step in range(5)])
    assert orders[0] == orders[1]


def test_student_learns_and_fixed_positions_stay(tmp_path):
    student, fitted = fit_student(tiny_store(tmp_path), steps=150, log_every=50)
    assert fitted.log[-1]["loss"] < 0.5 * fitted.log[0]["loss"]
    assert torch.equal(student.pos_embed, tiny_teacher().pos_embed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_update(value):
    model = nn.Linear(2, 1)
    before, config = None, TrainConfig(steps=5, batch_size=2)

    def step_loss(step):
        nonlocal before
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return model(torch.ones(2, 2)).mean() * (value if step == 2 else 1.0), torch.tensor([2 * step, 7])

    with pytest.raises(NonFiniteError, match=r"step 2: loss=.*Samples of the batch: \[4, 7\]"):
        fit(model, step_loss, config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_non_finite_gradient_of_a_finite_loss_stops_too():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteError, match=r"gradient norm=nan"):
        fit(model, lambda step: (model.weight.abs().sqrt().sum(), torch.tensor([0])), TrainConfig(steps=1))
    assert model.weight.item() == 0.0


def test_gradients_are_clipped_and_logged_unclipped():
    model = nn.Linear(1, 1, bias=False)
    fitted = fit(model, lambda step: (1e3 * model.weight.sum(), torch.tensor([0])), TrainConfig(steps=1))
    assert fitted.log[0]["grad_norm"] == pytest.approx(1e3)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, learning_rate=2.0, warmup_steps=10, cosine_decay=True)
    assert config.learning_rate_at(0) == pytest.approx(0.2)
    assert config.learning_rate_at(50) == pytest.approx(1.0)
    assert config.learning_rate_at(99) < 1e-2
    assert TrainConfig(steps=100, learning_rate=2.0).learning_rate_at(99) == 2.0


def test_ema_is_the_formula_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    ema, expected = Ema(model, 0.5), model.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            model.weight.add_(1.0)
            model.running_mean.add_(1.0)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state["weight"], expected)
    assert torch.equal(ema.state["running_mean"], model.running_mean)
    assert torch.equal(ema.copy_to(nn.BatchNorm1d(2)).weight, ema.state["weight"])
    with pytest.raises(ValueError, match=r"decay=1.0; expected 0 <= decay < 1"):
        Ema(model, 1.0)


def test_checkpoint_files_are_safetensors_with_their_hashes(tmp_path):
    store = tiny_store(tmp_path / "store")
    student, fitted = fit_student(store, steps=3)
    config = TrainConfig(steps=3)
    save_checkpoint(tmp_path / "checkpoint", student, fitted, config, {"history_layers": 1})
    facts = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    assert facts["step"] == 3 and facts["history_layers"] == 1 and facts["train"]["steps"] == 3
    for name, sha256 in facts["sha256"].items():
        assert file_sha256(tmp_path / "checkpoint" / name) == sha256
    for name, state in (("model", student.state_dict()), ("ema", fitted.ema.state)):
        loaded = load_file(tmp_path / "checkpoint" / f"{name}.safetensors")
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_config_answers_unknown_keys_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'train.learning_rat'; did you mean 'train.learning_rate'\?"):
        build(TrainConfig, {"steps": 1, "learning_rat": 1e-3}, where="train")
    with pytest.raises(ValueError, match=r"missing key 'steps'"):
        build(TrainConfig, {})
    with pytest.raises(ValueError, match=r"steps is 'many'; expected int"):
        build(TrainConfig, {"steps": "many"})
    with pytest.raises(ValueError, match=r"betas has 1 entries; expected 2"):
        build(TrainConfig, {"steps": 1, "betas": [0.9]})
    with pytest.raises(ValueError, match=r"steps=0; expected >= 1"):
        build(TrainConfig, {"steps": 0})
    assert build(TrainConfig, {"steps": 1, "ema_decay": 0, "betas": [0.9, 0.99]}).betas == (0.9, 0.99)


def test_merge_replaces_leaves_only():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merge(base, {"a": {"y": [5]}, "c": 4}) == {"a": {"x": 1, "y": [5]}, "b": 3, "c": 4}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3}
