"""Processes of one thread each that share out jobs: side by side where there are cores, with the same bits however many
there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from ard.common.allocator import keep_freed_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

POLL = 1.0  # seconds between two looks at what the workers have reported
_reported: Any = None  # in a worker: the counter that `report` adds to


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many, whatever the cores: sums over two threads round otherwise than over one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Started(Generic[Result]):
    """Jobs that workers do, or will do."""

    futures: list[Future[Result]]  # in the order of the jobs
    before: int  # what had been reported


class Workers:
    """``count`` processes, which end with the context, or with this process."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.count, self._reported = count, context.Value("q", 0)
        self._pool = ProcessPoolExecutor(count, context, _begin, (self._reported,))
        for _ in range(count):  # starts one each, which imports torch (2 s) while this process does something else
            self._pool.submit(_nothing)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], size: Callable[[Job], int] = lambda job: 1
    ) -> Started[Result]:
        """``function`` of every job, behind what was started before; the largest begin first."""
        before = self._reported.value
        futures: dict[int, Future[Result]] = {}
        for number in sorted(range(len(jobs)), key=lambda number: -size(jobs[number])):
            futures[number] = self._pool.submit(_do, function, jobs[number])
        return Started([futures[number] for number in range(len(jobs))], before)

    def finish(self, started: Started[Result], advance: Callable[[int], None] = lambda count: None) -> list[Result]:
        """What all of these jobs return, in their order. advance: gets what jobs `report` meanwhile."""
        shown, waiting = started.before, set(started.futures)
        while waiting:
            finished, waiting = wait(waiting, POLL, FIRST_EXCEPTION)
            for future in finished:
                future.result()  # raises what the job has raised
            reported = self._reported.value  # read once: a worker may add to it at any time
            advance(reported - shown)
            shown = reported
        return [future.result() for future in started.futures]

    def run(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Result]:
        """Starts and finishes them."""
        return self.finish(self.start(function, jobs), advance)


def report(count: int) -> None:
    """In a worker: so much more is done."""
    with _reported.get_lock():
        _reported.value += count


def _do(function: Callable[[Job], Result], job: Job) -> Result:
    """Checkpoints hold the state of torch's generator: the same one, whatever this worker has done before."""
    torch.manual_seed(0)
    return function(job)


def _nothing() -> None:
    pass


def _begin(reported: Any) -> None:
    """A worker has one thread; and it ends with its parent, which a pool's workers outlive if that is killed.

    A terminal's Ctrl-C reaches it too: one that has nothing to do ends without a word, a training after its step.
    """
    global _reported
    _reported = reported
    torch.set_num_threads(1)
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
