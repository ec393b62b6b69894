"""Two gloo processes train as one does: DDP and FSDP2, GAN, checkpoints, signals and bad samples. On the CPU.

One launch of distributed_worker.py makes the runs of two processes of the quick tests, another one the others'; what
they leave in their folders (checkpoints, log, what each rank saw) is compared with runs of this process. Equal
micro-batches averaged by powers of two give equal bits. Else runs differ by rounding, in float64: an error e of a
gradient moves a weight by at most rate * e / epsilon of Adam in a step, and e is some ulps of the largest gradient.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from ard.common.process import Process
from ard.common.streams import batch_indices
from ard.storage.checkpoints import newest, verified
from fault_runs import read_log
from student import distributed_worker
from student.distributed_worker import BATCH, COUNT, RATE, STEPS, Case, run_case
from student.training_runs import DOUBLE, GAN_GROUPS, GROUPS, Runs, execution

ULPS = 64 * torch.finfo(torch.float64).eps
BOUND = STEPS * RATE * ULPS / 1e-8
HELD, LIMIT_S = 3, 240
POISONED_STEP, POISONED_ROW = 2, 4  # a row of rank 1
POISON = {"poison": int(batch_indices(0, POISONED_STEP, BATCH, COUNT)[POISONED_ROW])}


FSDP = execution(strategy="fsdp")
# Made by two processes, in this order.
QUICK = {
    "ddp": {},
    "fsdp double": DOUBLE | FSDP,
    "fsdp recomputing": DOUBLE | execution(strategy="fsdp", activation_checkpointing=True),
    "gan fsdp": DOUBLE | {"gan": True} | FSDP,
    "poisoned fsdp": POISON | execution(strategy="fsdp", save_every=1),
    "one terminated": {"hold": HELD},
}
LONG = {
    "ddp double": DOUBLE,
    "ddp accumulating": DOUBLE | execution(accumulation=2),
    "fsdp accumulating": DOUBLE | execution(strategy="fsdp", accumulation=2),
    "ddp bf16": execution(precision="bf16"),
    "fsdp bf16": execution(strategy="fsdp", precision="bf16"),
    "gan ddp": DOUBLE | {"gan": True},
    "poisoned ddp": POISON | execution(accumulation=2, save_every=1),
    "one ddp one": DOUBLE | {"train": {"steps": 4}},
    "one fsdp one": DOUBLE | FSDP | {"train": {"steps": 4}},
    "ddp fsdp one": DOUBLE | {"train": {"steps": 2}},
    "ddp fsdp one, continued": DOUBLE | FSDP | {"train": {"steps": 4}, "name": "ddp fsdp one"},
    "all terminated": DOUBLE | FSDP | {"hold": HELD},
}
# Made by this process.
ALONE = {
    "alone": {},
    "alone accumulating": execution(accumulation=2),
    "alone double": DOUBLE,
    "alone gan": DOUBLE | {"gan": True},
}


class RunsOfTwo(Runs):
    """Also those of two processes, a launch at a time, when one of it is first asked for."""

    def path(self, name: str) -> Path:
        for cases in (QUICK, LONG):
            if name in cases and not (self.folder / name).exists():
                self._launch(cases)
        return super().path(name)

    def _launch(self, cases: dict[str, Case]) -> None:
        """Some of LONG go on with runs of one process, and are continued by one."""
        for name in ("one ddp one", "one fsdp one"):
            if name in cases:
                run_case(DOUBLE | {"name": name, "train": {"steps": 2}}, self.folder)
        launch(self.folder, cases)
        for name in ("one ddp one", "one fsdp one", "ddp fsdp one"):
            if name in cases:
                run_case(DOUBLE | {"name": name}, self.folder)


def slow(*values) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.slow)


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
        for name, signalled in (("one terminated", ranks[1:]), ("all terminated", ranks)):
            if name in cases:
                terminate(ranks, signalled, folder / name)
        codes = [rank.wait(timeout=LIMIT_S) for rank in ranks]
        assert codes == [0, 0], "\n".join(output.read_text()[-3000:] for output in outputs)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> RunsOfTwo:
    return RunsOfTwo(tmp_path_factory.mktemp("runs"), ALONE)


def test_ddp_equals_accumulation_bit_for_bit(runs):
    runs.assert_same("ddp", "alone accumulating")


@pytest.mark.parametrize("name", ["fsdp double", *map(slow, ("ddp double", "ddp accumulating", "fsdp accumulating"))])
def test_two_processes_equal_one(runs, name):
    runs.assert_same(name, "alone double", BOUND)
    assert runs.order(name) == runs.order("alone double")


def test_steps_clip_the_gradient(runs):
    """Otherwise the norm over shards would not be tested."""
    assert all(line["grad_norm"] > distributed_worker.TRAIN["grad_clip"] for line in read_log(runs.path("alone")))


def test_activation_checkpointing_of_shards_changes_no_bit(runs):
    runs.assert_same("fsdp recomputing", "fsdp double")


@pytest.mark.parametrize(("name", "share"), [("ddp", 1.0), ("fsdp double", 0.5)])
def test_fsdp_shards_weights_averages_gradients_and_moments(runs, name, share):
    """Every tensor that trains has an even number of rows here."""
    for seen in runs.seen(name):
        assert seen["sharded"] == dict.fromkeys(("weights", "averages", "gradients", "moments"), share)


@pytest.mark.slow
def test_bf16_keeps_float32_state_and_strategies_agree(runs):
    bound = torch.finfo(torch.bfloat16).eps
    runs.assert_same("fsdp bf16", "ddp bf16", bound)
    runs.assert_same("ddp bf16", "alone", 8 * bound, groups=())
    for name in ("ddp bf16", "fsdp bf16"):
        for group in GROUPS:
            assert {value.dtype for value in runs.checkpoint(name).read(group).values()} == {torch.float32}
        assert read_log(runs.path(name))[0]["loss"] != read_log(runs.path("alone"))[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one ddp one", "one fsdp one", "ddp fsdp one"])
def test_checkpoints_continue_on_any_number_of_processes(runs, name):
    runs.assert_same(name, "alone double", BOUND)
    assert runs.order(name) == runs.order("alone double")


@pytest.mark.slow
def test_checkpoints_hold_the_generators_of_all_ranks(runs):
    """The case continued by two processes starts with the states that the two before it had saved."""
    before, after = runs.seen("ddp fsdp one"), runs.seen("ddp fsdp one", step=2)
    saved = [seen["generator"] for seen in after]
    assert saved == [seen["last_generator"] for seen in before] and saved[0] != saved[1]
    finished = [seen["last_generator"] for seen in runs.seen("ddp double")]
    assert runs.checkpoint("ddp double").read("rng")["cpu"].tolist() == finished


@pytest.mark.parametrize(
    ("name", "reference", "bound"),
    [("one terminated", "alone accumulating", 0.0), slow("all terminated", "alone double", BOUND)],
)
def test_sigterm_saves_on_all_ranks_and_the_run_continues(runs, name, reference, bound):
    """The signal comes after ``HELD`` updates; in the next the ranks agree to stop."""
    saved = verified(runs.path(name) / "checkpoints" / f"step-{HELD + 1:08d}")
    assert [seen["step"] for seen in runs.seen(name)] == [saved.step] * 2
    assert all(f"stopped at step {saved.step} of {STEPS} and saved" in seen["error"] for seen in runs.seen(name))
    run_case({"name": name} | ALONE[reference], runs.folder)
    runs.assert_same(name, reference, bound)
    assert runs.order(name) == runs.order(reference)


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp")])
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


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp")])
def test_gan_on_two_processes_equals_one(runs, strategy):
    runs.assert_same(f"gan {strategy}", "alone gan", BOUND, GAN_GROUPS)
    log = read_log(runs.path("alone gan"))
    assert ["generator_weight" in line for line in log] == [False] * 2 + [True] * (STEPS - 2)
    first, second = runs.seen(f"gan {strategy}")
    assert first["discriminator"] == second["discriminator"]
