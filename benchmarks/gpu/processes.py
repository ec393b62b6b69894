"""Processes that are watched from outside, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.files import ROOT

# Exit status of a stage's program that ran whole and found something wrong. Any other but 0 is a crash: faulthandler's
# watchdog and Python itself end with 1.
FAILED = 9
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


def watched(command: list[str], end: float, log: Path, environment: dict[str, str]) -> int | None:
    """Exit status of `command`; None if it was ended at time.monotonic() `end`. Nothing it started outlives it.

    What it prints is added to `log`, and shown here as it comes.
    """
    with log.open("ab") as output, log.open(errors="replace") as shown:
        shown.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while (status := child.poll()) is None and time.monotonic() < end:
                time.sleep(0.2)
                sys.stdout.write(shown.read())
            return status
        finally:  # also on Ctrl-C
            end_descendants()
            child.poll()
            sys.stdout.write(shown.read())
            sys.stdout.flush()


def output_of(*command: str, timeout: float = 40, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; 127 where it is not installed.

    `environment` is added to ours. Over its time (124), the command and what it started are ended.
    """
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, f"{command[0]}: not installed"
    try:
        text = child.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return 124, f"{child.communicate()[0].strip()}\n{command[0]}: still running after {timeout:.0f} s"
    return child.returncode, text.strip()


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME or CUDA_PATH, beside nvcc, or where NVIDIA installs it."""
    roots = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    nvcc = shutil.which("nvcc")
    folders = [f"{root}/bin" for root in (*roots, "/usr/local/cuda")]
    folders += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return next(filter(None, (shutil.which(name, path=path) for path in (None, *folders))), None)
