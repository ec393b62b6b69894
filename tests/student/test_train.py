"""The training loop: reproducible, guarded against non-finite values, able to learn, and careful when it continues."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ard.common.process import Process
from ard.config.sections import ExecutionConfig, TrainConfig
from ard.data.trajectories import StoreSpec, TrajectoryStore, generate_store
from ard.diffusion.trajectories import TrajectoryBatch
from ard.models.config import Condition
from ard.models.dit import DiT, DiTConfig
from ard.models.student import ARDStudent
from ard.training.ema import Ema
from ard.training.log import RunLog
from ard.training.objectives import MicroBatch, Objective, StudentObjective, TeacherObjective
from ard.training.run_state import Run
from ard.training.trainer import Fitted, NonFiniteError, Trainer
from fault_runs import read_log, snapshot, toy_trainer, train
from torch import Tensor, nn

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


def teacher_objective(teacher: DiT, label_dropout: float = 0.1) -> TeacherObjective:
    return objective_of(teacher, label_dropout=label_dropout, seed=0, device=teacher.weight.device)


def objective_of(teacher: DiT, **settings) -> TeacherObjective:
    convention, null = teacher.config.CONVENTION, teacher.null_conditions
    return TeacherObjective(*images_and_labels(), convention=convention, null=null, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    labels = (Condition("labels", classes=3),)
    spec = StoreSpec(30, 16, 0, (1, 4, 4), labels, sampling_steps=25, keep=(15, 5, 0), cfg_scale=1.0, cfg_channels=1)

    def contract(noise: Tensor, labels: Tensor) -> TrajectoryBatch:
        """A trajectory that shrinks the noise towards the label: predictable from noise and label."""
        end = (labels.float() - 1).view(-1, 1, 1, 1)
        states = torch.stack([noise * (1 - f) + end * f for f in (0.3, 0.6, 1.0)], dim=1)
        return TrajectoryBatch(noise, states, -states, (labels,))

    return generate_store(tmp_path_factory.mktemp("store"), spec, contract)


def fit_student(store, device: torch.device, seed=0, **changes) -> tuple[ARDStudent, Fitted]:
    student = ARDStudent.from_teacher(tiny_teacher().to(device), steps=3, history_layers=1)
    student.pos_embed.requires_grad_(False)
    settings = {"batch_size": 8, "learning_rate": 3e-3, **changes}
    objective, process = StudentObjective(store, state="x0", seed=seed, device=device), Process(device=device)
    return student, Trainer(student, objective, TrainConfig(seed=seed, **settings), process=process).fit()


def without_speed(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in log]


class Losses(Objective):
    """Losses that a function gives; ``rows`` are those of the micro-batch."""

    def __init__(self, losses: Callable[[nn.Module, MicroBatch], Tensor]):
        super().__init__(count=6, seed=0)
        self.sample_losses = losses


def fit(model: nn.Module, losses: Callable, run: Run | None = None, **changes) -> Fitted:
    config, process = TrainConfig(**{"steps": 1, "batch_size": 2, **changes}), Process(device=place(model))
    return Trainer(model, Losses(losses), config, process=process, run=run).fit()


def place(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def test_teacher_loss_falls_and_log_is_written(tmp_path, device):
    teacher, steps = tiny_teacher().to(device), []
    config = TrainConfig(steps=90, batch_size=32, learning_rate=3e-3, log_every=30)
    run, process = Run(tmp_path, {}, {}), Process(device=device)
    objective = teacher_objective(teacher)
    fitted = Trainer(teacher, objective, config, process=process, run=run).fit(on_step=steps.append)
    assert read_log(tmp_path) == fitted.log and [line["step"] for line in fitted.log] == [30, 60, 90]
    assert fitted.log[-1]["loss"] < 0.5 * fitted.log[0]["loss"]
    assert steps == list(range(1, 91)) and fitted.step == 90


def test_garbage_collection_leaves_the_heap_alone_while_a_run_trains():
    frozen = []
    with pytest.raises(KeyError):
        toy_trainer(None).fit(on_step=lambda step: frozen.append(gc.get_freeze_count()) if step < 3 else {}[step])
    assert len(frozen) == 2 and min(frozen) > 1000 and gc.get_freeze_count() == 0


def test_all_of_a_run_is_on_its_device(store, device):
    """Weights, averages, gradients and moments, whatever other devices the machine has."""
    student = ARDStudent.from_teacher(tiny_teacher().to(device), steps=3, history_layers=1)
    seen = set()
    handle = student.register_forward_hook(lambda _, inputs, out: seen.update(t.device.type for t in (*inputs, out)))
    objective, process = StudentObjective(store, state="x0", seed=0, device=device), Process(device=device)
    trainer = Trainer(student, objective, TrainConfig(steps=2, batch_size=4), process=process)
    trainer.fit()
    handle.remove()
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in student.parameters() if parameter.requires_grad]
    for tensor in (*student.state_dict().values(), *trainer.ema.state.values(), *gradients, *moments):
        seen.add(tensor.device.type)
    assert seen == {device.type} and moments and gradients


def test_lines_hold_means_since_the_line_before(tmp_path):
    every = toy_trainer(tmp_path / "1", log_every=1).fit().log
    third = toy_trainer(tmp_path / "3", log_every=3).fit().log
    assert [line["step"] for line in third] == [3, 6]
    for number, line in enumerate(third):
        lines = every[3 * number : 3 * number + 3]
        assert line["loss"] == math.fsum(each["loss"] for each in lines) / 3
        assert line["grad_norm"] == lines[-1]["grad_norm"] and line["learning_rate"] == lines[-1]["learning_rate"]
        assert line["samples_per_second"] > 0


def test_teacher_trains_its_first_channels_only_when_it_has_sigma(device):
    teacher = tiny_teacher(learn_sigma=True).to(device)
    objective = teacher_objective(teacher, label_dropout=0.0)
    batch = objective.batch(0, 4)
    assert batch.shape == (4,)
    objective.sample_losses(teacher, MicroBatch(0, batch, slice(0, 4))).mean().backward()
    rows = teacher.final_layer.linear.bias.grad.view(2, 2, 2)  # patch row, patch column, channel
    assert rows[..., 0].abs().sum() > 0 and rows[..., 1].abs().sum() == 0


def test_label_dropout_uses_the_null_row(device):
    teacher = tiny_teacher().to(device)
    nn.init.normal_(teacher.final_layer.linear.weight)  # zero at the start: no gradient would reach the labels
    nn.init.normal_(teacher.final_layer.adaLN_modulation[1].weight)
    for dropout, touched in ((0.0, [True, True, True, False]), (1.0, [False, False, False, True])):
        teacher.zero_grad()
        objective = teacher_objective(teacher, dropout)
        objective.sample_losses(teacher, MicroBatch(0, objective.batch(0, 12), slice(0, 12))).mean().backward()
        assert (teacher.y_embedder.embedding_table.weight.grad.abs().sum(1) > 0).tolist() == touched


def test_rows_of_a_micro_batch_are_those_of_the_batch():
    """However a step is cut up, a sample meets the same noise, timestep and dropped label."""
    teacher = tiny_teacher().double()
    nn.init.normal_(teacher.final_layer.linear.weight)
    objective = objective_of(teacher, label_dropout=0.5, seed=1)
    batch = objective.batch(3, 6)
    model = lambda x, t, y: teacher(x.double(), t, y).float()  # noqa: E731
    whole = objective.sample_losses(model, MicroBatch(3, batch, slice(0, 6)))
    parts = [objective.sample_losses(model, MicroBatch(3, batch, slice(row, row + 1))) for row in range(6)]
    assert torch.equal(whole, torch.cat(parts)) and len(whole.unique()) == 6


def test_accumulated_gradients_are_those_of_the_whole_batch(device):
    """In float64; an order of summation apart, a step's gradient is the same, and so is the logged loss."""

    def fitted(accumulation: int) -> tuple[Tensor, list[dict]]:
        torch.manual_seed(0)
        model, inputs = nn.Linear(3, 2).to(device, torch.float64), torch.randn(6, 3, dtype=torch.float64).to(device)
        losses = Losses(lambda model, micro: model(inputs[micro.indices]).square().mean(1))
        config, execution = TrainConfig(1, batch_size=4, grad_clip=1e9), ExecutionConfig(accumulation=accumulation)
        log = Trainer(model, losses, config, execution=execution, process=Process(device=device)).fit().log
        return model.weight.grad, log

    (whole, log), (parts, parts_log) = fitted(1), fitted(4)
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(parts, whole, rtol=0, atol=16 * eps * float(whole.abs().max()))
    assert parts_log[0]["loss"] == pytest.approx(log[0]["loss"], rel=16 * eps)
    with pytest.raises(ValueError, match=r"batch_size is 4; expected a multiple of 3: 1 processes times 3"):
        fitted(3)


def test_runs_are_reproducible_and_seeds_differ(store, device):
    runs = [fit_student(store, device, seed, steps=20, log_every=5) for seed in (0, 0, 1)]
    (first, first_fit), (again, again_fit), (other, _) = runs
    assert without_speed(first_fit.log) == without_speed(again_fit.log)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(first_fit.ema.state[name], again_fit.ema.state[name])
    assert not torch.equal(first.final_layer.linear.weight, other.final_layer.linear.weight)


def test_a_run_on_disk_computes_what_one_in_memory_does(tmp_path, device):
    on_disk = toy_trainer(tmp_path, device=device)
    log = on_disk.fit().log
    in_memory = toy_trainer(None, device=device)  # sets torch's seed
    assert without_speed(in_memory.fit().log) == without_speed(log)
    for name, value in on_disk.model.state_dict().items():
        assert torch.equal(value, in_memory.model.state_dict()[name])


class Recorded(StudentObjective):
    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen = [*getattr(self, "seen", []), indices]
        return super().rows(indices)


def test_students_with_and_without_history_see_the_same_batches(store):
    orders = []
    for layers in (0, 2):
        student = ARDStudent.from_teacher(tiny_teacher(), steps=3, history_layers=layers)
        objective = Recorded(store, state="x0", seed=4)
        Trainer(student, objective, TrainConfig(steps=5, batch_size=8, seed=4)).fit()
        orders.append(torch.stack(objective.seen))
    assert torch.equal(*orders) and len(orders[0].unique()) == 30


def test_student_learns_and_fixed_positions_stay(store, device):
    student, fitted = fit_student(store, device, steps=60, log_every=20)
    assert fitted.log[-1]["loss"] < 0.5 * fitted.log[0]["loss"]
    assert torch.equal(student.pos_embed.cpu(), tiny_teacher().pos_embed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_update_and_names_the_samples(tmp_path, value, device):
    model, before, batches = nn.Linear(2, 1).to(device), {}, []

    def losses(model: nn.Module, micro: MicroBatch) -> Tensor:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        batches.append(micro.batch.tolist())
        factors = torch.tensor([value if micro.step == 2 and row == 1 else 1.0 for row in range(2)], device=device)
        return model(torch.ones(2, 2, device=device))[:, 0] * factors[micro.rows]

    with pytest.raises(NonFiniteError, match=r"step 2: loss=.*No update was made") as error:
        fit(model, losses, Run(tmp_path, {}), steps=5)
    batch = batches[-1]
    assert f"not finite: [{batch[1]}], of the batch {batch}" in str(error.value)
    found = json.loads((tmp_path / "nonfinite-step-00000002.json").read_text())
    assert found["step"] == 2 and found["samples"] == [batch[1]] and found["batch"] == batch
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_non_finite_gradient_of_a_finite_loss_stops_too(device):
    model = nn.Linear(1, 1, bias=False, device=device)
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteError, match=r"grad_norm=nan.*not finite: none"):
        fit(model, lambda model, micro: model.weight.abs().sqrt()[0].expand(2))
    assert model.weight.item() == 0.0


def test_gradients_are_clipped_and_logged_unclipped(device):
    model = nn.Linear(1, 1, bias=False, device=device)
    fitted = fit(model, lambda model, micro: (1e3 * model.weight[0]).expand(2))
    assert fitted.log[0]["grad_norm"] == 1e3
    # clip_grad_norm_ scales by limit / (norm + 1e-6)
    assert model.weight.grad.item() == pytest.approx(1.0, rel=1e-9 + 4 * torch.finfo(torch.float32).eps)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, learning_rate=2.0, warmup_steps=10, cosine_decay=True)
    assert config.learning_rate_at(0) == 0.2
    assert config.learning_rate_at(50) == pytest.approx(1.0, rel=1e-15)
    assert config.learning_rate_at(99) == 1.0 + math.cos(0.99 * math.pi)
    assert TrainConfig(steps=100, learning_rate=2.0).learning_rate_at(99) == 2.0


def test_the_learning_rate_of_each_step_is_used(device):
    """Adam's first update is the learning rate, whatever the gradient: without warm-up ten times that of ten steps."""
    updates = []
    for warmup in (0, 10):
        model = nn.Linear(1, 1, bias=False, device=device, dtype=torch.float64)
        before = model.weight.item()
        fit(model, lambda model, micro: model.weight[0].expand(2), learning_rate=0.5, warmup_steps=warmup)
        updates.append(before - model.weight.item())
    assert updates[0] == pytest.approx(0.5, rel=1e-7) and updates[1] == pytest.approx(0.05, rel=1e-7)


def test_ema_is_the_formula_and_copies_buffers(device):
    model = nn.BatchNorm1d(2).to(device)
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
    assert torch.equal(ema.copy_to(nn.BatchNorm1d(2).to(device)).weight, ema.state["weight"])
    with pytest.raises(ValueError, match=r"decay=1.0; expected 0 <= decay < 1"):
        Ema(model, 1.0)


def test_preview_sees_the_averages_at_its_steps_and_at_the_end(tmp_path, device):
    trainer, seen = toy_trainer(tmp_path, device=device), {}

    def preview(step: int, averages: dict[str, Tensor]) -> dict[str, float]:
        assert all(torch.equal(value, trainer.ema.state[name]) for name, value in averages.items())
        seen[step] = float(averages["0.weight"].sum())
        return {"distance": step / 2}

    log = trainer.fit(preview=preview, preview_every=4).log
    assert list(seen) == [4, 6] and len(set(seen.values())) == 2
    assert [line.get("distance") for line in log] == [None, 2.0, 3.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.5}, r"a run with train.learning_rate=0.01; expected 0.5 to continue it"),
        ({"betas": (0.5, 0.9)}, r"a run with train.betas=\[0.9, 0.999\]; expected \[0.5, 0.9\]"),
        ({"cosine_decay": True}, r"a run with train.cosine_decay=False; expected True"),
    ],
)
def test_another_setting_is_refused_on_resume_and_nothing_is_changed(tmp_path, changes, message):
    train(tmp_path, steps=3)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, **changes)
    assert snapshot(tmp_path) == before


def test_without_resume_a_run_starts_anew(tmp_path):
    train(tmp_path / "fresh", steps=4, learning_rate=0.5)
    train(tmp_path / "used", steps=9)
    trainer = toy_trainer(tmp_path / "used", steps=4, learning_rate=0.5, resume=False)
    assert trainer.step == 0
    trainer.fit()
    assert snapshot(tmp_path / "used") == snapshot(tmp_path / "fresh")


def test_a_finished_run_is_not_trained_on(tmp_path):
    train(tmp_path)
    before, steps = snapshot(tmp_path), []
    fitted = train(tmp_path, steps.append)
    assert steps == [] and fitted.step == 6 and len(fitted.log) == 3
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_last_checkpoints_are_kept_and_the_end_is_saved(tmp_path, keep_last):
    train(tmp_path, steps=7, save_every=3, keep_last=keep_last)
    kept = sorted(os.listdir(tmp_path / "checkpoints"))
    assert kept == ["step-00000003", "step-00000006", "step-00000007"][-keep_last:]


def test_fewer_checkpoints_are_kept_from_a_resume_on(tmp_path):
    train(tmp_path, keep_last=3)
    train(tmp_path, keep_last=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000006"]


def test_a_line_that_a_kill_has_cut_off_is_dropped(tmp_path: Path):
    train(tmp_path)
    before = snapshot(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 10, "lo')
    RunLog(tmp_path, 6).close()
    assert snapshot(tmp_path) == before


def test_settings_of_execution_may_change_on_resume(tmp_path):
    config = TrainConfig(steps=4, batch_size=4)
    assert config.identity() == replace(config, steps=8, log_every=1).identity()
    toy_trainer(tmp_path, steps=3, save_every=1).fit()
    assert toy_trainer(tmp_path, steps=6, save_every=5, keep_last=1, log_every=3).fit().step == 6


class SeesAnotherFolder(Process):
    """One of two ranks; the other has found a checkpoint one step later."""

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows + 1])


def test_ranks_that_find_different_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found different newest checkpoints, of steps \[0, 1\]; expected one folder"):
        Trainer(nn.Linear(2, 1), Losses(None), TrainConfig(1, 2), process=SeesAnotherFolder(), run=Run(tmp_path, {}))


def test_a_run_in_progress_is_not_started_twice(tmp_path):
    first = Trainer(nn.Linear(2, 1), Losses(None), TrainConfig(1, 2), run=Run(tmp_path, {}))
    with pytest.raises(ValueError, match=r"another job is writing to it"):
        Trainer(nn.Linear(2, 1), Losses(None), TrainConfig(1, 2), run=Run(tmp_path, {}))
    assert first.step == 0


def test_tensorboard_gets_the_lines_of_the_log(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    execution = ExecutionConfig(tensorboard=True)
    run, config = Run(tmp_path, {}), TrainConfig(steps=3, batch_size=2, log_every=1)
    model = nn.Linear(1, 1)
    losses = Losses(lambda model, micro: model(torch.ones(2, 1)).square().flatten())
    fitted = Trainer(model, losses, config, execution=execution, run=run).fit()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in fitted.log]


def test_missing_tensorboard_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    execution = ExecutionConfig(tensorboard=True)
    with pytest.raises(ImportError, match=r"execution.tensorboard=false: log.jsonl holds the same values"):
        Trainer(nn.Linear(1, 1), Losses(None), TrainConfig(1, 2), execution=execution, run=Run(tmp_path, {}))
    assert list(tmp_path.iterdir()) == []
