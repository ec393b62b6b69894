"""`pytest benchmarks`: every room measures what this machine can run, and writes results/<device>/<room>.json.

A bench_*.py file lists its comparisons in GROUPS and has one test per candidate. The first of a group times all its
candidates, in turns; each test then hands its own times to pytest-benchmark. A candidate that this machine refuses is
skipped with the reason, so is a peer that gives other results than the rest; one of ours that does fails. A room's file
is written when all of it ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.board import Board
from benchmarks.rows import results_folder
from benchmarks.tables import speed_table
from benchmarks.timing import keep_freed_memory

BOARD = pytest.StashKey[Board]()


class Clock:
    """What pytest-benchmark reads as time: it moves by what was measured."""

    def __init__(self):
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds

    def advance(self, milliseconds: Iterator[float]) -> None:
        self.seconds += next(milliseconds, 0.0) / 1e3


clock = Clock()


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder for result files; default benchmarks/results/<device>")


def pytest_configure(config):
    keep_freed_memory()
    config.stash[BOARD] = Board(config.getoption("--results") or results_folder())
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc):
    """A test that takes (group, candidate) runs for every candidate of its module's GROUPS."""
    if {"group", "candidate"} <= set(metafunc.fixturenames):
        pairs = [(group, name) for group in metafunc.module.GROUPS for name in group.names]
        metafunc.parametrize(("group", "candidate"), pairs, ids=[f"{group.label}-{name}" for group, name in pairs])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock.read))
        config.stash[BOARD].room(item.path).device = getattr(item.module, "DEVICE", None)


def pytest_deselected(items):
    for item in items:
        item.config.stash[BOARD].room(item.path).incomplete = "not all of it was selected"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed:
        item.config.stash[BOARD].room(item.path).incomplete = "a test of it failed"


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture
def room(request):
    return request.config.stash[BOARD].room(request.path)


@pytest.fixture
def report(request, room):
    """Call with a group and one of its candidates: measures, and gives the candidate's times to pytest-benchmark."""

    def give(group, candidate):
        found = request.config.stash[BOARD].result(room, group)
        if candidate in found.wrong:
            pytest.fail(f"{candidate} {found.wrong[candidate]}")
        if candidate in found.refused:
            pytest.skip(f"{candidate}: {found.refused[candidate]}")
        samples = found.timings[candidate].samples
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group.label
        benchmark.name = candidate
        benchmark.pedantic(clock.advance, (iter(samples),), rounds=len(samples))

    return give


def pytest_sessionfinish(session):
    board, ran = session.config.stash[BOARD], {(item.path, item.originalname) for item in session.items}
    for item in session.items:
        room, groups = board.room(item.path), getattr(item.module, "GROUPS", [])
        tests = {(item.path, name) for name in vars(item.module) if name.startswith("test_")}
        if set(room.groups) != set(groups) or not tests <= ran:
            room.incomplete = room.incomplete or "not all of it was run"


@pytest.hookimpl(trylast=True)  # at the very end
def pytest_terminal_summary(terminalreporter, config):
    board = config.stash[BOARD]
    rows = [row for room in board.rooms.values() for row in room.rows]
    if rows:
        terminalreporter.section("ours against the fastest alternative")
        terminalreporter.write_line(speed_table(rows))
    for line in board.write() if not config.option.collectonly else ():
        terminalreporter.write_line(line)
