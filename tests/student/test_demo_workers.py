"""Jobs of the demo in processes beside each other: order, progress, errors, ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ard.common.progress import progress_bar
from ard.demo import workers as room
from ard.demo.workers import Workers, cores, report, threads


def wait_and_report(steps: int) -> tuple[int, int]:
    for _ in range(steps):
        time.sleep(0.02)
        report(1)
    return steps, torch.get_num_threads()


def fail(job: int) -> None:
    raise ValueError(f"job {job}")


@pytest.fixture(scope="module")
def two():
    with Workers(2) as workers:
        yield workers


def test_results_are_in_the_order_of_the_jobs_and_of_one_thread(two):
    first = two.start(wait_and_report, [1, 3, 2], size=lambda job: job)
    assert two.run(wait_and_report, [4]) == [(4, 1)]
    assert two.finish(first) == [(1, 1), (3, 1), (2, 1)]


def test_steps_inside_jobs_are_reported_as_they_are_done(two, monkeypatch):
    monkeypatch.setattr(room, "POLL", 0.1)
    seen: list[int] = []
    two.run(wait_and_report, [50], seen.append)
    assert sum(seen) == 50 and sum(count > 0 for count in seen) > 2  # not at the job's end


def test_a_pipe_gets_lines_while_jobs_run(two, monkeypatch, capsys):
    monkeypatch.setattr(room, "POLL", 0.05)
    monkeypatch.setattr("ard.common.progress.INTERVAL", 0.3)
    with progress_bar("students", 100) as advance:
        two.run(wait_and_report, [50, 50], advance)
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "students: 0 of 100, started" and last.startswith("students: 100 of 100, done in ")
    assert between and all(re.match(r"students: \d+ of 100", line) for line in between)


def test_the_error_of_a_job_is_raised(two):
    with pytest.raises(ValueError, match="job 1"):
        two.run(fail, [1])
    assert two.run(wait_and_report, [1]) == [(1, 1)]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_cores_are_those_that_this_process_may_use():
    before = os.sched_getaffinity(0)
    assert cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


PARENT = """
import os, time
from ard.demo.workers import Workers

def pid(_):
    return os.getpid()


if __name__ == "__main__":
    print(*Workers(1).run(pid, [0]), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / parent.stdout.readline().strip()
    assert worker.is_dir()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while worker.is_dir() and "Z (zombie)" not in (worker / "status").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert not worker.is_dir() or "Z (zombie)" in (worker / "status").read_text()


def drawn(job: int) -> float:
    return torch.rand(job)[0].item()


def test_generator_does_not_depend_on_earlier_jobs():
    with Workers(1) as workers:
        first, second = workers.run(drawn, [5, 4])
    assert first == second
