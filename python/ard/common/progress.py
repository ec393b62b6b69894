"""Progress of a long stage on stderr: a bar in a terminal; elsewhere, as in a log file, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

INTERVAL = 30.0  # seconds between two lines


@contextmanager
def progress_bar(name: str, total: int, is_main: bool = True, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields advance(n=1): on the main process of rich's bar in a terminal, of `Lines` elsewhere; else of nothing."""
    if not is_main:
        yield lambda n=1: None
    elif sys.stderr.isatty():
        with _bar(name, total, done) as advance:
            yield advance
    else:
        lines = Lines(name, total, done, sys.stderr)
        try:
            yield lines.advance
        finally:
            lines.end()


def counted(advance: Callable[[int], None]) -> Callable[[int], None]:
    """on_step(updates done so far), as trainers call it, from advance; a run that continues starts where it was."""
    shown = 0

    def on_step(done: int) -> None:
        nonlocal shown
        advance(done - shown)
        shown = done

    return on_step


@contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda n=1: progress.advance(task, n)


@dataclass
class Lines:
    """A line at the start, at the end, and at the first advance that comes INTERVAL seconds after the last line.

    The rate is that since the last line; what the first advance brings was there before, or includes the warm-up.
    """

    name: str
    total: int
    done: int
    stream: TextIO

    def __post_init__(self) -> None:
        self.start = self.said = time.monotonic()
        self.since: tuple[float, int] | None = None  # time, and what was done then: the rate is measured from it
        self._say(f"{self._count()}, started")

    def advance(self, n: int = 1) -> None:
        self.done, now = self.done + n, time.monotonic()
        if now - self.said >= INTERVAL and self.done < self.total:
            self._say(self._count() + self._speed(now))
            self.said, self.since = now, None
        if self.since is None:
            self.since = now, self.done

    def end(self) -> None:
        """Says how far it came, be it to the end or not."""
        took, whole = _hours(time.monotonic() - self.start), self.done >= self.total
        self._say(f"{self._count()}, done in {took}" if whole else f"stopped at {self._count()} after {took}")

    def _count(self) -> str:
        return f"{min(self.done, self.total)} of {self.total}"

    def _speed(self, now: float) -> str:
        if self.since is None or self.done <= self.since[1] or now <= self.since[0]:
            return ""
        rate = (self.done - self.since[1]) / (now - self.since[0])
        return f", {rate:.3g} per second, {_hours((self.total - self.done) / rate)} left"

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=self.stream, flush=True)


def _hours(seconds: float) -> str:
    """Such as 0:02:45."""
    return str(timedelta(seconds=round(max(0.0, seconds))))
