"""Two gloo processes train as one does: DDP and FSDP2, GAN, checkpoints, signals and bad samples.

One launch of distributed_worker.py makes most runs of two processes; what they leave in their folders (checkpoints,
log, what each rank saw) is compared with runs of this process. Equal micro-batches averaged by powers of two give equal
bits. Else runs differ by rounding, in float64: an error e of a gradient moves a weight by at most rate * e / epsilon of
Adam in a step, and e is some ulps of the largest gradient.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ard.gan import LocalBatchNorm
from ard.losses import sample_mse
from ard.objectives import MicroBatch
from ard.parallel import Process
from ard.runlog import read_log
from ard.streams import batch_indices
from ard.training_state import newest, verified
from student import distributed_worker
from student.distributed_worker import (
    BATCH,
    COUNT,
    RATE,
    STEPS,
    gan_objective,
    run_case,
    tiny_store,
    tiny_student,
)
from torch import nn
from torch._dynamo.utils import counters

ULPS = 64 * torch.finfo(torch.float64).eps
BOUND = STEPS * RATE * ULPS / 1e-8
GROUPS = ("model", "ema", "optimizer")
GAN_GROUPS = (*GROUPS, "discriminator", "discriminator_optimizer")
DOUBLE = {"dtype": "float64"}
HELD, LIMIT_S = 3, 240
POISONED_STEP, POISONED_ROW = 2, 4  # a row of rank 1
POISON = {"poison": int(batch_indices(0, POISONED_STEP, BATCH, COUNT)[POISONED_ROW])}


def execution(**settings) -> dict:
    return {"execution": settings}


FSDP = execution(strategy="fsdp")
# Made by two processes, in this order.
CASES = {
    "ddp": {},
    "ddp double": DOUBLE,
    "ddp accumulating": DOUBLE | execution(accumulation=2),
    "fsdp double": DOUBLE | FSDP,
    "fsdp accumulating": DOUBLE | execution(strategy="fsdp", accumulation=2),
    "fsdp recomputing": DOUBLE | execution(strategy="fsdp", activation_checkpointing=True),
    "ddp bf16": execution(precision="bf16"),
    "fsdp bf16": execution(strategy="fsdp", precision="bf16"),
    "gan ddp": DOUBLE | {"gan": True},
    "gan fsdp": DOUBLE | {"gan": True} | FSDP,
    "poisoned ddp": POISON | execution(accumulation=2, save_every=1),
    "poisoned fsdp": POISON | execution(strategy="fsdp", save_every=1),
    "one ddp one": DOUBLE | {"train": {"steps": 4}},
    "one fsdp one": DOUBLE | FSDP | {"train": {"steps": 4}},
    "ddp fsdp one": DOUBLE | {"train": {"steps": 2}},
    "ddp fsdp one, continued": DOUBLE | FSDP | {"train": {"steps": 4}, "name": "ddp fsdp one"},
    "one terminated": {"hold": HELD},
    "all terminated": DOUBLE | FSDP | {"hold": HELD},
}
# Made by this process, when first asked for.
ALONE = {
    "alone": {},
    "alone accumulating": execution(accumulation=2),
    "alone double": DOUBLE,
    "alone recomputing": execution(activation_checkpointing=True),
    "alone gan": DOUBLE | {"gan": True},
    "alone gan, float": {"gan": True},
}


class Runs:
    """A folder with the store and a folder for each run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        if name in ALONE and not (self.folder / name).exists():
            run_case({"name": name} | ALONE[name], self.folder)
        return self.folder / name

    def checkpoint(self, name: str):
        return newest(self.path(name) / "checkpoints")

    def seen(self, name: str, step: int = 0) -> list[dict]:
        """What each rank saw in the process that started at ``step``."""
        return [json.loads((self.path(name) / f"seen-{step}-{rank}.json").read_text()) for rank in (0, 1)]

    def order(self, name: str) -> list[list[int]]:
        """Sample ids of each step, from all ranks and all processes that had a part in the run."""
        rows = [row for path in self.path(name).glob("seen-*.json") for row in json.loads(path.read_text())["seen"]]
        steps = {step: [] for step in range(1 + max(step for step, _, _ in rows))}
        for step, _, ids in sorted(rows):
            steps[step] += ids
        return list(steps.values())

    def assert_same(self, name: str, other: str, bound: float = 0.0, groups: tuple[str, ...] = GROUPS) -> None:
        """Checkpoints and logs agree: weights and moments relative to the largest of their kind."""
        one, two = self.checkpoint(name), self.checkpoint(other)
        assert one.step == two.step == STEPS
        for group in groups:
            values, others = one.read(group), two.read(group)
            assert values.keys() == others.keys()
            scales: dict[str, float] = {}
            for key, value in others.items():
                scales[kind(group, key)] = max(scales.get(kind(group, key), 0.0), float(value.abs().max()))
            for key, value in values.items():
                assert (value - others[key]).abs().max() <= bound * scales[kind(group, key)], (group, key)
        log, other_log = read_log(self.path(name)), read_log(self.path(other))
        assert [line["step"] for line in log] == [line["step"] for line in other_log] == list(range(1, STEPS + 1))
        for line, other_line in zip(log, other_log, strict=True):
            assert line.keys() == other_line.keys()
            for key in line.keys() - {"samples_per_second"}:
                assert abs(line[key] - other_line[key]) <= bound * max(1.0, abs(other_line[key])), (line["step"], key)


def kind(group: str, key: str) -> str:
    """Moments of one order, or all weights."""
    return key.partition(".")[0] if "optimizer" in group else ""


def terminate(ranks: list[subprocess.Popen], signalled: list[subprocess.Popen], run: Path) -> None:
    """Sends SIGTERM to some ranks while all are held, then lets them go on."""
    deadline = time.monotonic() + LIMIT_S
    while not all((run / f"ready-{rank}").exists() for rank in range(len(ranks))):
        if time.monotonic() > deadline or any(rank.poll() is not None for rank in ranks):
            return  # `launch` shows why
        time.sleep(0.02)
    for rank in signalled:
        rank.send_signal(signal.SIGTERM)
    (run / "go").touch()


def launch(folder: Path, cases: dict[str, dict]) -> None:
    """Runs the cases on two processes, as torchrun would; both must exit 0."""
    (folder / "cases.json").write_text(json.dumps([{"name": name} | case for name, case in cases.items()]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command, ranks = [sys.executable, "-X", "faulthandler", distributed_worker.__file__, str(folder), "cases.json"], []
    outputs = [folder / f"output-{rank}.txt" for rank in (0, 1)]
    try:
        for rank, output in enumerate(outputs):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(output, "w") as file:
                ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        terminate(ranks, ranks[1:], folder / "one terminated")
        terminate(ranks, ranks, folder / "all terminated")
        codes = [rank.wait(timeout=LIMIT_S) for rank in ranks]
        assert codes == [0, 0], "\n".join(output.read_text()[-3000:] for output in outputs)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    tiny_store(folder / "store")
    torch.set_num_threads(1)
    for name in ("one ddp one", "one fsdp one"):
        run_case(DOUBLE | {"name": name, "train": {"steps": 2}}, folder)
    launch(folder, CASES)
    for name in ("one ddp one", "one fsdp one", "ddp fsdp one"):
        run_case(DOUBLE | {"name": name}, folder)
    return Runs(folder)


def test_ddp_equals_accumulation_bit_for_bit(runs):
    runs.assert_same("ddp", "alone accumulating")


@pytest.mark.parametrize("name", ["ddp double", "ddp accumulating", "fsdp double", "fsdp accumulating"])
def test_two_processes_equal_one(runs, name):
    runs.assert_same(name, "alone double", BOUND)
    assert runs.order(name) == runs.order("alone double")


def test_steps_clip_the_gradient(runs):
    """Otherwise the norm over shards would not be tested."""
    assert all(line["grad_norm"] > distributed_worker.TRAIN["grad_clip"] for line in read_log(runs.path("alone")))


@pytest.mark.parametrize("names", [("alone recomputing", "alone"), ("fsdp recomputing", "fsdp double")])
def test_activation_checkpointing_changes_no_bit(runs, names):
    runs.assert_same(*names)


@pytest.mark.parametrize(("name", "share"), [("ddp double", 1.0), ("fsdp double", 0.5)])
def test_fsdp_shards_weights_averages_gradients_and_moments(runs, name, share):
    """Every tensor that trains has an even number of rows here."""
    for seen in runs.seen(name):
        assert seen["sharded"] == dict.fromkeys(("weights", "averages", "gradients", "moments"), share)


def test_bf16_keeps_float32_state_and_strategies_agree(runs):
    bound = torch.finfo(torch.bfloat16).eps
    runs.assert_same("fsdp bf16", "ddp bf16", bound)
    runs.assert_same("ddp bf16", "ddp", 8 * bound, groups=())
    for name in ("ddp bf16", "fsdp bf16"):
        for group in GROUPS:
            assert {value.dtype for value in runs.checkpoint(name).read(group).values()} == {torch.float32}
        assert read_log(runs.path(name))[0]["loss"] != read_log(runs.path("ddp"))[0]["loss"]


@pytest.mark.parametrize("name", ["one ddp one", "one fsdp one", "ddp fsdp one"])
def test_checkpoints_continue_on_any_number_of_processes(runs, name):
    runs.assert_same(name, "alone double", BOUND)
    assert runs.order(name) == runs.order("alone double")


def test_checkpoints_hold_the_generators_of_all_ranks(runs):
    """The case continued by two processes starts with the states that the two before it had saved."""
    before, after = runs.seen("ddp fsdp one"), runs.seen("ddp fsdp one", step=2)
    saved = [seen["generator"] for seen in after]
    assert saved == [seen["last_generator"] for seen in before] and saved[0] != saved[1]
    assert runs.checkpoint("ddp").read("rng")["cpu"].tolist() == [s["last_generator"] for s in runs.seen("ddp")]


@pytest.mark.parametrize(
    ("name", "reference", "bound"),
    [("one terminated", "alone accumulating", 0.0), ("all terminated", "alone double", BOUND)],
)
def test_sigterm_saves_on_all_ranks_and_the_run_continues(runs, name, reference, bound):
    """The signal comes after ``HELD`` updates; in the next the ranks agree to stop."""
    saved = verified(runs.path(name) / "checkpoints" / f"step-{HELD + 1:08d}")
    assert [seen["step"] for seen in runs.seen(name)] == [saved.step] * 2
    assert all(f"stopped at step {saved.step} of {STEPS} and saved" in seen["error"] for seen in runs.seen(name))
    run_case({"name": name} | ALONE[reference], runs.folder)
    runs.assert_same(name, reference, bound)
    assert runs.order(name) == runs.order(reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_non_finite_loss_of_one_rank_stops_all_before_the_update(runs, strategy):
    path, sample = runs.path(f"poisoned {strategy}"), POISON["poison"]
    found = json.loads((path / f"nonfinite-step-{POISONED_STEP:08d}.json").read_text())
    assert found["samples"] == [sample] and found["loss"] == found["grad_norm"] == "nan"
    assert found["batch"] == batch_indices(0, POISONED_STEP, BATCH, COUNT).tolist()
    checkpoint = verified(path / "checkpoints" / f"step-{POISONED_STEP:08d}")
    assert checkpoint == newest(path / "checkpoints")
    for seen in runs.seen(path.name):
        assert f"loss is not finite: [{sample}]" in seen["error"]
        assert seen["step"] == POISONED_STEP
        assert seen["weights"] == distributed_worker.state_sha256(checkpoint.read("model"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_must_divide_among_processes_and_micro_batches(runs, world_size):
    expected = f"batch_size is 8; expected a multiple of {3 * world_size}: {world_size} processes times 3 micro-batches"
    with pytest.raises(ValueError, match=expected):
        run_case({"name": "indivisible"} | execution(accumulation=3), runs.folder, Process(world_size=world_size))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gan_on_two_processes_equals_one(runs, strategy):
    runs.assert_same(f"gan {strategy}", "alone gan", BOUND, GAN_GROUPS)
    log = read_log(runs.path("alone gan"))
    assert ["generator_weight" in line for line in log] == [False] * 2 + [True] * (STEPS - 2)
    first, second = runs.seen(f"gan {strategy}")
    assert first["discriminator"] == second["discriminator"]


def test_gan_resumes_bit_for_bit(runs):
    for steps in (1, 3, STEPS):
        run_case({"name": "gan resumed", "gan": True, "train": {"steps": steps}}, runs.folder)
    runs.assert_same("gan resumed", "alone gan, float", groups=GAN_GROUPS)


class Gan:
    """Objective and student in float64, and one batch."""

    def __init__(self, runs: Runs):
        dtype, store = torch.float64, tiny_store(runs.folder / "store")
        self.student = tiny_student(dtype)
        self.objective = gan_objective(self.student, store, Process(), dtype).observe(dtype, None)
        self.discriminator, self.teacher = self.objective.discriminator, self.objective.teacher
        self.batch = self.objective.batch(0, BATCH)
        self.states, self.targets, self.labels = self.objective.rows(self.batch)

    def backward(self, step: int) -> dict[str, float]:
        micro = MicroBatch(step, self.batch, slice(0, BATCH))
        return {k: float(v) for k, v in self.objective.backward(self.student, micro, 1.0, nullcontext).items()}

    def logits(self, images, labels):
        c_BC = self.objective.condition(labels)
        return self.discriminator(self.objective.features(images, c_BC), c_BC)

    def gradients(self, loss, module: nn.Module) -> list[torch.Tensor]:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(loss, parameters, retain_graph=True))


@pytest.fixture
def gan(runs) -> Gan:
    return Gan(runs)


def assert_gradients(module: nn.Module, expected: list[torch.Tensor]) -> None:
    got = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(got, expected, strict=True):
        assert (gradient - other).abs().max() <= ULPS * scale


def test_adaptive_weight_and_gradients_are_the_definition(gan):
    predictions = gan.student(gan.states, gan.labels)
    fake, config = predictions[:, -1], gan.objective.config
    regression, generator = sample_mse(predictions, gan.targets).mean(), -gan.logits(fake, gan.labels).mean()
    head = gan.student.final_layers[-1].linear
    of_regression, of_generator = (gan.gradients(loss, head)[0].norm() for loss in (regression, generator))
    weight = float(of_regression) / (float(of_generator) + 1e-4)
    student_gradients = gan.gradients(regression + config.factor * weight * generator, gan.student)
    real, real_labels = gan.objective.real.rows(batch_indices(0, config.start, BATCH, 20, "real"))
    hinge = F.relu(1 - gan.logits(real, real_labels)).mean() + F.relu(1 + gan.logits(fake.detach(), gan.labels)).mean()
    discriminator_gradients = gan.gradients(hinge, gan.discriminator)

    got = gan.backward(config.start)
    expected = {"loss": regression.item(), "generator_loss": generator.item(), "generator_weight": weight}
    expected["discriminator_loss"] = hinge.item()
    for name, value in expected.items():
        assert abs(got[name] - value) <= ULPS * abs(value), name
    assert_gradients(gan.student, student_gradients)
    assert_gradients(gan.discriminator, discriminator_gradients)


def test_before_its_start_the_gan_only_trains_the_heads(gan):
    predictions = gan.student(gan.states, gan.labels)
    expected = gan.gradients(sample_mse(predictions, gan.targets).mean(), gan.student)
    gan.backward(0)
    assert_gradients(gan.student, expected)
    assert all(parameter.grad is not None for parameter in gan.discriminator.parameters())
    assert all(parameter.grad is None for parameter in gan.teacher.parameters())


def test_features_are_the_tokens_after_each_block(gan):
    images, outputs = gan.states[:, 0], gan.objective.features(gan.states[:, 0], gan.objective.condition(gan.labels))
    for depth in range(1, len(outputs) + 1):
        teacher, tokens = distributed_worker.tiny_teacher(torch.float64), outputs[depth - 1]
        teacher.blocks = teacher.blocks[:depth]
        shift, scale = teacher.final_layer.adaLN_modulation(gan.objective.condition(gan.labels))[:, None].chunk(2, -1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        expected = teacher(images, torch.zeros_like(gan.labels), gan.labels)
        got = teacher.unpatchify(teacher.final_layer.linear(tokens)[:, None], 1)[:, 0]
        assert (got - expected).abs().max() <= ULPS * expected.abs().max()


def test_spectral_norms_take_one_power_iteration_per_update(gan):
    spectral = gan.discriminator.heads[0].pointwise[0].parametrizations.weight
    u, v = spectral[0]._u.clone(), spectral[0]._v.clone()
    gan.backward(0)
    gan.backward(2)
    assert torch.equal(spectral[0]._u, u) and torch.equal(spectral[0]._v, v)
    gan.objective.update()
    u = F.normalize(spectral.original.flatten(1) @ v, dim=0)
    assert (spectral[0]._u - u).abs().max() <= ULPS
    assert (spectral[0]._v - F.normalize(spectral.original.flatten(1).T @ u, dim=0)).abs().max() <= ULPS


@pytest.mark.parametrize(("count", "group"), [(8, 4), (6, 3), (3, 3), (5, 1)])
def test_local_batch_norm_is_batch_norm_of_each_group(count, group):
    norm, x = LocalBatchNorm(5, virtual_batch=group).double(), torch.randn(count, 5, 7, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = [F.batch_norm(rows, None, None, norm.weight, norm.bias, training=True) for rows in x.split(group)]
    assert (norm(x) - torch.cat(expected)).abs().max() <= ULPS * norm.weight.abs().max()
    with pytest.raises(ValueError, match=r"got 5 samples; expected a multiple of 2"):
        LocalBatchNorm(3, virtual_batch=2)(torch.zeros(5, 3, 7))


def test_compiled_blocks_train_alike_and_layers_share_graphs(runs):
    counters.clear()
    run_case(DOUBLE | {"name": "compiled"} | execution(compile=True), runs.folder)
    # The first block has no pending residual and reads history; the other two are the same.
    assert counters["stats"]["unique_graphs"] == 2
    runs.assert_same("compiled", "alone double", BOUND)
