"""Killed runs: whenever the kill comes, the run continues, loses one interval at most, and ends as if never killed.

Training is killed at random and at every change it makes on disk, and so is trajectory writing, by one process and by
two. What is on disk at the end must equal an undisturbed run's, byte for byte.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from ard.models.config import Condition
from ard.storage import checkpoints
from ard.training.trainer import Stopped
from fault_runs import (
    DEATHS,
    SPEC,
    Child,
    dying,
    finished_samples,
    generate,
    generate_as,
    in_memory,
    litter,
    read_log,
    snapshot,
    toy_trainer,
    train,
    trajectories,
)

FEW = 3  # in the quick tests
KILLS = [FEW, pytest.param(8, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.exhaustive)]

tmp_path = in_memory


def saved_step(folder: Path) -> int:
    """Updates in the newest checkpoint; a damaged one under a final name is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = checkpoints.newest(folder / "checkpoints")
    return checkpoint.step if checkpoint else 0


def seconds_of(work: Callable, folder: Path) -> float:
    """How long ``work`` takes undisturbed; what it leaves in ``folder`` is what others must arrive at."""
    Child(work, folder / "warm-up").kill_after(None)
    child, started = Child(work, folder), time.perf_counter()
    child.kill_after(None)
    shutil.rmtree(folder / "warm-up")
    return time.perf_counter() - started


def until_killed(count: int, tmp_path: Path, seconds: float, attempt: Callable[[Path, float], bool]) -> list[Path]:
    """Folders that were worked on, with ``count`` kills in all, each at a random time of the work that was left.

    attempt: (folder, seconds until the kill) -> whether the work was finished before. A folder is left when finished.
    """
    draw, folders, kills, torn = random.Random(0), [tmp_path / "0"], 0, 0
    # With many kills until one has come amid writing: chance may leave that out of the first of them.
    while kills < count or (count > FEW and not torn and kills < 20 * count):
        if attempt(folders[-1], draw.uniform(0, seconds / 2)):
            folders.append(tmp_path / str(len(folders)))
            continue
        kills += 1
        torn += bool(litter(folders[-1])) if folders[-1].exists() else 0
    assert torn > 0 or count == FEW, "no kill came amid writing: the kills do not test anything"
    return folders


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("save_every", [1, 3])
def test_training_killed_at_random_continues_and_ends_the_same(tmp_path, kills, save_every):
    work = partial(train, save_every=save_every, steps=12)
    seconds = seconds_of(work, tmp_path / "undisturbed")

    def attempt(folder: Path, delay: float) -> bool:
        before = saved_step(folder)
        steps, finished = Child(work, folder).kill_after(delay)
        done = max([before, *steps])
        assert done - done % save_every <= saved_step(folder) <= done + 1
        assert steps == list(range(before + 1, done + 1))
        return finished

    for folder in until_killed(kills, tmp_path, seconds, attempt):
        work(folder)
        assert snapshot(folder) == snapshot(tmp_path / "undisturbed")


@pytest.mark.parametrize("kills", KILLS)
def test_generation_killed_at_random_continues_and_ends_the_same(tmp_path, kills):
    settings = {"count": 60, "shard_size": 5, "conditions": (Condition("labels", classes=60),)}
    seconds = seconds_of(partial(generate, **settings), tmp_path / "undisturbed")
    sizes = itertools.cycle((1, 4, 3, 64))

    def attempt(folder: Path, delay: float) -> bool:
        before = finished_samples(folder)
        batches, finished = Child(partial(generate, batch_size=next(sizes), **settings), folder).kill_after(delay)
        made, after = list(itertools.chain(*batches)), finished_samples(folder)
        assert made == sorted(set(range(60)) - before)[: len(made)], "made twice, left out, or out of order"
        assert before <= after and after <= before | set(made)
        assert len((before | set(made)) - after) <= 5, "more than one shard was lost"
        return finished

    for folder in until_killed(kills, tmp_path, seconds, attempt):
        store = generate(folder, **settings)
        store.verify()
        assert snapshot(folder) == snapshot(tmp_path / "undisturbed")
        assert torch.equal(store.read("noise", torch.arange(60)), store.spec.noise(range(60)))
        assert store.read("labels", torch.arange(60)).tolist() == list(range(60))


def deaths(work: Callable, start: Path | None, tmp_path: Path, every: int) -> list[Path]:
    """Folders where ``work``, from a copy of ``start``, has died at every n-th change on disk, or (0) amid a file."""
    folders = []
    for number in itertools.count(step=every or 1):
        folders.append(tmp_path / f"died-{number}")
        if start:
            shutil.copytree(start, folders[-1])
        _, finished = Child(dying, work, number, not every, folders[-1]).kill_after(None)
        if finished:
            return folders[:-1]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("every", DEATHS)
@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_death_at_any_change_of_a_save_keeps_a_good_checkpoint(tmp_path, damaged, every):
    """The save also removes a checkpoint, and, if the newest was damaged, replaces that one."""
    work, start = partial(train, steps=3, keep_last=2), tmp_path / "start"
    train(tmp_path / "undisturbed", steps=3, keep_last=2)
    train(start, steps=3 if damaged else 2, keep_last=2)
    if damaged:
        damage(start / "checkpoints/step-00000003/model.safetensors")
    folders = deaths(work, start, tmp_path, every)
    assert len(folders) >= (40 // every if every else 7), "a save flushes 6 files and log.jsonl"
    for folder in folders:
        if damaged:
            with warnings.catch_warnings(record=True) as caught:
                assert checkpoints.newest(folder / "checkpoints").step >= 2
            assert all("step-00000003 is damaged" in str(each.message) for each in caught)
        else:
            assert saved_step(folder) >= 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if damaged else "error")
            work(folder)
        assert snapshot(folder) == snapshot(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("every", DEATHS)
def test_a_death_at_any_change_of_a_fresh_start_can_be_started_anew(tmp_path, every):
    """``resume=False`` removes what is there; died in between and begun again, it still starts at the first step."""
    work, start = partial(train, steps=1, resume=False), tmp_path / "start"
    train(tmp_path / "undisturbed", steps=1)
    train(start, steps=2, learning_rate=0.5)
    folders = deaths(work, start, tmp_path, every)
    assert len(folders) >= (40 // every if every else 7)
    for folder in folders:
        work(folder)
        assert snapshot(folder) == snapshot(tmp_path / "undisturbed")


@pytest.mark.parametrize("every", DEATHS)
def test_a_death_at_any_change_of_a_generation_loses_one_shard_at_most(tmp_path, every):
    generate(tmp_path / "undisturbed")
    folders = deaths(generate, None, tmp_path, every)
    assert len(folders) >= (40 // every if every else 2 + 2 * SPEC.shards)
    finished = []
    for folder in folders:
        finished.append(finished_samples(folder) if folder.exists() else set())
        batches = []
        store = generate(folder, batches.append, batch_size=3)
        assert list(itertools.chain(*batches)) == sorted(set(range(23)) - finished[-1])
        store.verify()
        assert snapshot(folder) == snapshot(tmp_path / "undisturbed")
    assert all(earlier <= later for earlier, later in itertools.pairwise(finished))
    assert finished[0] == set() and finished[-1] == set(range(23))


def pair(folder: Path, works: list[Callable]) -> list[Child]:
    meeting = folder.with_suffix(".meeting")
    return [Child(work, rank, 2, meeting, folder) for rank, work in enumerate(works)]


def test_two_processes_write_the_store_of_one(tmp_path):
    generate(tmp_path / "undisturbed")
    made = [child.kill_after(None) for child in pair(tmp_path / "two", [generate_as, generate_as])]
    assert [finished for _, finished in made] == [True, True]
    assert [sum(map(len, batches)) for batches, _ in made] == [8 + 7, 8]  # shards 0 and 2, shard 1
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", [0, 3, 6])
def test_one_of_two_processes_dies_and_one_finishes(tmp_path, change):
    generate(tmp_path / "undisturbed")
    first, second = pair(tmp_path / "two", [generate_as, partial(dying, generate_as, change, False)])
    assert second.kill_after(None)[1] is False
    first.stop()
    before, batches = finished_samples(tmp_path / "two"), []
    generate(tmp_path / "two", batches.append)
    assert list(itertools.chain(*batches)) == sorted(set(range(23)) - before)
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "undisturbed")


def stopping_at(steps: set[int]) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step in steps else None


@pytest.mark.parametrize("save_every", [1, 4, 100])
def test_resume_and_resume_of_resume_equal_the_undisturbed_run(tmp_path, save_every, device):
    """Stopped by SIGTERM, of which the next step takes notice, and by the number of steps asked for."""
    settings = {"save_every": save_every, "keep_last": 1, "device": device}
    whole = train(tmp_path / "whole", steps=12, **settings)
    with pytest.raises(Stopped, match=r"parts: stopped at step 3 of 12 and saved; give the command again to continue"):
        train(tmp_path / "parts", stopping_at({2}), steps=12, **settings)
    assert train(tmp_path / "parts", steps=6, **settings).step == 6
    with pytest.raises(Stopped, match=r"stopped at step 9 of 12"):
        train(tmp_path / "parts", stopping_at({8, 9}), steps=12, **settings)
    resumed = toy_trainer(tmp_path / "parts", steps=12, **settings)
    assert resumed.step == 9
    parts = resumed.fit()
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "whole")
    assert all(torch.equal(value, whole.ema.state[name]) for name, value in parts.ema.state.items())
    assert [line["step"] for line in parts.log] == [line["step"] for line in whole.log] == [2, 4, 6, 8, 10, 12]


def test_scalars_of_a_preview_survive_until_their_line(tmp_path):
    """The preview of step 3 stands in the line of step 4; the run stops in between."""

    def previewed(folder: Path, steps: set[int]) -> None:
        preview = lambda step, ema: {"distance": float(step)}  # noqa: E731
        toy_trainer(folder).fit(preview=preview, preview_every=3, on_step=stopping_at(steps))

    previewed(tmp_path / "whole", set())
    with pytest.raises(Stopped):
        previewed(tmp_path / "parts", {2})
    previewed(tmp_path / "parts", set())
    assert [line.get("distance") for line in read_log(tmp_path / "whole")] == [None, 3.0, 6.0]
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "whole")


def train_on(folder: Path, report: Callable[[int], None]) -> None:
    """Until a signal comes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
    train(folder, report, steps=10**6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_status(tmp_path, number):
    training = Child(train_on, tmp_path)
    seen = [training.report() for _ in range(3)]
    assert training.end(0, number) == 128 + number
    seen += training.reports()
    assert saved_step(tmp_path) == seen[-1] and litter(tmp_path) == []


def test_a_signal_in_the_last_step_stops_what_would_come_next(tmp_path):
    with pytest.raises(Stopped, match=r"run: stopped at step 3 of 3$"):
        train(tmp_path / "run", stopping_at({2, 3}), steps=3)
    assert saved_step(tmp_path / "run") == 3


@pytest.fixture
def foreground(monkeypatch):
    """SIGINT as in a terminal: in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_ctrl_c_stays_ignored(tmp_path, foreground):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raising = lambda step: signal.raise_signal(signal.SIGINT)  # noqa: E731
    assert train(tmp_path / "run", raising, steps=3).step == 3


def test_a_finished_run_that_is_asked_for_more_steps_is_unfinished_at_once(tmp_path):
    """Also if it ends before it saves again."""
    train(tmp_path / "run", steps=3)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", lambda step: 1 / 0, steps=9, save_every=100)
    found = checkpoints.newest(tmp_path / "run/checkpoints")
    assert (found.step, found.facts["steps"]) == (3, 9)
    assert train(tmp_path / "run", steps=2).step == 3  # no step to go: finished again
    assert checkpoints.newest(tmp_path / "run/checkpoints").facts["steps"] == 2


def test_a_second_ctrl_c_does_not_wait(tmp_path, foreground):
    trainer = toy_trainer(tmp_path / "run", steps=10, save_every=100)

    def backward(module, micro, share, context):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.1)
        raise AssertionError("it went on")

    trainer.objective.backward = backward
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert saved_step(tmp_path / "run") == 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_toy_is_a_fair_test(tmp_path):
    """Steps differ, dropout draws, and the fake teacher's rows are those of their noise."""
    log = train(tmp_path / "run").log
    assert len({line["loss"] for line in log}) == len(log) == 3
    trainer = toy_trainer(None)
    before = torch.get_rng_state()
    trainer.fit()
    assert not torch.equal(before, torch.get_rng_state())
    noise = SPEC.noise(range(4))
    assert torch.equal(trajectories(noise, None).x0[1:3], trajectories(noise[1:3], None).x0)
