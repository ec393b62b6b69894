"""`pytest benchmarks`: every room measures what this machine can run, and writes results/<device>/<room>.json.

A bench_*.py file lists its comparisons in GROUPS and has one test per candidate. The first of a group times all its
candidates, in turns; each test then gives pytest-benchmark the rounds of its own (`hand_over`). A candidate that this
machine refuses is skipped with the reason, so is a peer that gives other results than the rest; one of ours that does
fails. A room's file is written when all of it ran. --partial keeps what is measured of a room in <room>.partial, and
goes on behind it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ard_kernels.common import extension
from ard_kernels.tune.search import describe
from benchmarks.files import ROOT, write_json
from benchmarks.gpu.journal import ENDED, Journal
from benchmarks.measure import Group, Measurement
from benchmarks.results import Row, environment, results_folder
from benchmarks.tables import candidate_errors_table, right_table, speed_table
from benchmarks.timing import DEVICE, TINY, keep_freed_memory

ROOMS = pytest.StashKey["dict[Path, Room]"]()


@dataclass
class Room:
    """Results of one bench_*.py file: a measurement or why there is none by group, and facts that are no times."""

    file: Path  # where its results go
    device: torch.device
    keep_partial: bool
    groups: dict[str, Measurement | str] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    incomplete: str = ""  # why its file is not written

    def __post_init__(self):
        if self.keep_partial and self.partial.is_file():
            for label, found in json.loads(self.partial.read_text()).items():
                rows = [Row.read(entry) for entry in found["rows"]]
                self.groups[label] = Measurement(rows, {}, found["refused"], found["wrong"])

    @property
    def partial(self) -> Path:
        return self.file.with_suffix(".partial")

    @property
    def rows(self) -> list[Row]:
        return [row for found in self.groups.values() if isinstance(found, Measurement) for row in found.rows]

    def result(self, group: Group) -> Measurement:
        """The measurement of `group`, made when it is not there yet; it fails for every candidate alike."""
        if group.label not in self.groups:
            try:
                self.groups[group.label] = group.measure()
            except Exception as error:
                self.groups[group.label] = describe(error)
            _leave_a_broken_context()
            if self.keep_partial:
                made = {name: found for name, found in self.groups.items() if isinstance(found, Measurement)}
                write_json(self.partial, {name: entry_of(found) for name, found in made.items()})
        found = self.groups[group.label]
        if isinstance(found, str):
            raise RuntimeError(f"{group.label}: {found}")
        return found

    def write(self) -> str:
        """Its file, if all of it ran; a line about it."""
        if self.incomplete:
            return f"{self.file.stem}: {self.incomplete}, its results file stays as it was"
        rows = [row.entry() for row in self.rows]
        write_json(self.file, {"environment": environment(self.device), "rows": rows, **self.facts})
        self.partial.unlink(missing_ok=True)
        return f"wrote {self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file}"


def _leave_a_broken_context() -> None:
    """After an error inside a kernel no CUDA call of a process works: what follows would look refused."""
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the CUDA context is broken: {error}", returncode=70)


def entry_of(found: Measurement) -> dict:
    return {"rows": [row.entry() for row in found.rows], "refused": found.refused, "wrong": found.wrong}


def hand_over(benchmark, milliseconds: Sequence[float]) -> None:
    """Make rounds that have been timed the data of pytest-benchmark's own statistics, table and --benchmark-json.

    Candidates have to take turns within a round, and on a GPU be timed by events; the plugin times one function at a
    time by the clock, in a loop of its own. So our timer measures, once, and the plugin gets each round as it gets
    those of `pedantic`; its API has no public call for that.
    """
    benchmark._mode = "interleaved rounds of benchmarks/timing.py"
    stats = benchmark._make_stats(iterations=1)
    for sample in milliseconds:
        stats.update(sample / 1e3)


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder for result files; default benchmarks/results/<device>")
    parser.addoption("--partial", action="store_true", help="keep and go on behind what was measured of a room")


def pytest_ignore_collect(collection_path, config):
    """The tests of these tools run by `pytest` or by their own name, not in a benchmark run."""
    own = Path(__file__).parent / "tests"
    asked = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    if collection_path == own and not any(path == own or own in path.parents for path in asked):
        return True
    return None


def pytest_configure(config):
    keep_freed_memory()
    if extension.restrained_isa() is not None:  # Inductor's cache has code for all instructions: with it Flex is wrong
        folder = tempfile.TemporaryDirectory(prefix="inductor-")
        config.add_cleanup(folder.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    config.stash[ROOMS] = {}
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    if TINY and DEVICE.type == "cpu":
        from benchmarks.gpu.machine import simulate

        simulate()


def pytest_generate_tests(metafunc):
    """A test that takes (group, candidate) runs for every candidate of its module's GROUPS."""
    if {"group", "candidate"} <= set(metafunc.fixturenames):
        pairs = [(group, name) for group in metafunc.module.GROUPS for name in group.names]
        metafunc.parametrize(("group", "candidate"), pairs, ids=[f"{group.label}-{name}" for group, name in pairs])


def room_of(item) -> Room:
    rooms, folder = item.config.stash[ROOMS], item.config.getoption("--results") or results_folder()
    if item.path not in rooms:
        file = folder / f"{item.path.stem.removeprefix('bench_')}.json"
        device = getattr(item.module, "DEVICE", DEVICE)
        rooms[item.path] = Room(file, device, item.config.getoption("--partial"))
    return rooms[item.path]


def is_benchmark(item) -> bool:
    return item.path.name.startswith("bench_")


def pytest_collection_modifyitems(items):
    for item in filter(is_benchmark, items):
        room_of(item)


def pytest_deselected(items):
    for item in filter(is_benchmark, items):
        room_of(item).incomplete = "not all of it was selected"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed and is_benchmark(item):
        room_of(item).incomplete = "a test of it failed"


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def room(request):
    return room_of(request.node)


@pytest.fixture(scope="session")
def ended(request) -> dict[str, str]:
    """Tests that have ended an earlier process of this run, as gpu-check found, with the reason."""
    journal = request.config.getoption("--journal", None)
    failures = Journal(journal).failures() if journal else []
    return {entry["what"]: entry["why"] for entry in failures if entry["why"].startswith(ENDED)}


@pytest.fixture
def report(request, room, ended):
    """Call with a group and one of its candidates: measures, and gives the candidate's times to pytest-benchmark."""

    def give(group, candidate):
        if reason := ended.get(request.node.nodeid):
            room.groups.setdefault(group.label, reason)
        found = room.result(group)
        if candidate in found.wrong:
            pytest.fail(f"{candidate} {found.wrong[candidate]}")
        if candidate in found.refused:
            pytest.skip(f"{candidate}: {found.refused[candidate]}")
        if candidate in found.timings:  # not of what an earlier run has measured
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = group.label
            benchmark.name = candidate
            hand_over(benchmark, found.timings[candidate].samples)

    return give


def pytest_sessionfinish(session):
    ran = {(item.path, item.originalname) for item in session.items}
    for item in filter(is_benchmark, session.items):
        room = room_of(item)
        labels = {group.label for group in getattr(item.module, "GROUPS", [])}
        tests = {(item.path, name) for name in vars(item.module) if name.startswith("test_")}
        if set(room.groups) != labels or not tests <= ran:
            room.incomplete = room.incomplete or "not all of it was run"


@pytest.hookimpl(trylast=True)  # at the very end
def pytest_terminal_summary(terminalreporter, config):
    rooms = config.stash[ROOMS].values()
    rows = [row for room in rooms for row in room.rows]
    if rows:
        terminalreporter.section("ours against the fastest alternative")
        terminalreporter.write_line(speed_table(rows))
    if checked := [row for row in rows if "errors" in row.facts]:
        terminalreporter.section("every candidate against fp64")
        terminalreporter.write_line(candidate_errors_table(checked))
        terminalreporter.section("who is right where, of attention")
        terminalreporter.write_line(right_table(checked))
    for room in rooms if not config.option.collectonly else ():
        terminalreporter.write_line(room.write())
