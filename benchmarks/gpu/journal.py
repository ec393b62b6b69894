"""What a stage has found, a line of JSON each, only ever appended: whole at any moment, whatever ends the process.

Written by the stage's program, or by pytest with `-p benchmarks.gpu.journal --journal FILE`. A line has `what` (a
test, a kernel, a tool on a backend), `outcome` (passed, failed or skipped), and more; {"begin": what} stands before
work that may end the process.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.gpu.processes import FAILED

MOST_TEXT = 4000
ENDED = "it ended its process"


class Journal:
    def __init__(self, path: Path):
        self.path = path

    def write(self, **entry) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(entry).encode() + b"\n")

    def entries(self, size: int | None = None) -> list[dict]:
        """Of the first `size` bytes, without what stands behind the last line's end: that write was interrupted."""
        text = self.path.read_bytes()[:size] if self.path.is_file() else b""
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

    def results(self, size: int | None = None) -> list[dict]:
        """One of each: the last."""
        return list({entry["what"]: entry for entry in self.entries(size) if "outcome" in entry}.values())

    def done(self, size: int | None = None) -> set[str]:
        return {entry["what"] for entry in self.results(size)}

    def failures(self) -> list[dict]:
        return [entry for entry in self.results() if entry["outcome"] == "failed"]

    def mend(self) -> None:
        """Drop a torn last line, or the next one would stand behind it."""
        if self.path.is_file():
            text = self.path.read_bytes()
            self.path.write_bytes(text[: text.rfind(b"\n") + 1])

    def blame(self, why: str) -> str | None:
        """Its process has ended: what had begun has failed, and is not begun again; None if nothing had."""
        self.mend()
        begun = [entry["begin"] for entry in self.entries() if "begin" in entry]
        if not begun or begun[-1] in self.done():
            return None
        self.write(what=begun[-1], outcome="failed", why=why)
        return begun[-1]

    @contextmanager
    def piece(self, what: str, seconds: float) -> Iterator[dict]:
        """Work that is to blame when the process ends inside, as it does after `seconds`; the dict is for its line."""
        self.write(begin=what)
        entry = {"what": what, "outcome": "passed"}
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            yield entry
        except Exception as error:
            entry |= {"outcome": "failed", "why": f"{type(error).__name__}: {error}"[:MOST_TEXT]}
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.write(**entry)
        print(f"  {what}: {entry['outcome']} {entry.get('why', '')}", flush=True)


# As a plugin of pytest


def pytest_addoption(parser):
    parser.addoption("--journal", type=Path, help="file for a line of JSON for each test that ran")
    help_skip = "FILE:BYTES, a journal whose tests, in so many bytes, are not run again"
    parser.addoption("--journal-skip", action="append", default=[], help=help_skip)
    parser.addoption("--journal-seconds", type=float, default=60.0, help="a test that takes longer ends its process")


def pytest_collection_modifyitems(config, items):
    """A worker that replaces another must find the same tests, though the journal has grown: hence the bytes."""
    done = set()
    for path, _, size in (argument.rpartition(":") for argument in config.getoption("--journal-skip")):
        done |= Journal(Path(path)).done(int(size))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """pytest-timeout needs the GIL, which a launch holds that waits for a kernel that hangs; this watchdog does not.

    Under xdist the worker is replaced, and the test blamed.
    """
    faulthandler.dump_traceback_later(item.config.getoption("--journal-seconds"), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Writer:
    """In the process that hears of every test."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def pytest_runtest_logstart(self, nodeid):
        self.journal.write(begin=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":  # a worker that died reports "???"
            why = {} if report.outcome == "passed" else {"why": report.longreprtext[-MOST_TEXT:]}
            seconds = round(getattr(report, "duration", 0.0), 2)
            self.journal.write(what=report.nodeid, outcome=report.outcome, seconds=seconds, **why)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        """FAILED where a test has failed; 0 where none was left to run."""
        if exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = FAILED
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--journal-skip"):
            session.exitstatus = 0


def pytest_configure(config):
    path = config.getoption("--journal")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(Journal(path)))
