"""Processes that are watched from outside, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
# A process that waits for a GPU which does not answer cannot be ended at once; after that it is left alone.
ENDING_SECONDS = 8.0


def adopt() -> None:
    """From now on orphans of our descendants are our children: `end_descendants` finds them, whatever they detach."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """Ids of the processes that this one and those have started, but for zombies."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(file.parent.name))
    found, unseen = [], [os.getpid()]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def end_descendants() -> None:
    give_up = time.monotonic() + ENDING_SECONDS
    while (running := descendants()) and time.monotonic() < give_up:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def watched(command: list[str], overdue: Callable[[], str], **how) -> int | str:
    """Exit status of `command`, or why it was ended: what `overdue`, asked five times a second, says first.

    Asked to by SIGUSR1, a Python process prints where it is (faulthandler.register). Nothing it started outlives it.
    """
    child = subprocess.Popen(command, start_new_session=True, **how)
    try:
        while (status := child.poll()) is None:
            if reason := overdue():
                child.send_signal(signal.SIGUSR1)
                time.sleep(0.3)
                return reason
            time.sleep(0.2)
        return status
    finally:  # also on Ctrl-C
        end_descendants()
        child.poll()
