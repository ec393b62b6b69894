"""Progress of a stage: lines where stderr is no terminal, a bar where it is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ard.common import progress
from ard.common.progress import counted, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """now[0] is what time.monotonic says to ard.progress."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_line_at_start_every_30_seconds_and_at_the_end(capsys, clock):
    with progress_bar("teacher", 800) as advance:
        for _ in range(800):
            clock[0] += 0.25  # 4 per second, 200 s in all
            advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "teacher: 0 of 800, started",
        "teacher: 120 of 800, 4 per second, 0:02:50 left",
        "teacher: 240 of 800, 4 per second, 0:02:20 left",
        "teacher: 360 of 800, 4 per second, 0:01:50 left",
        "teacher: 480 of 800, 4 per second, 0:01:20 left",
        "teacher: 600 of 800, 4 per second, 0:00:50 left",
        "teacher: 720 of 800, 4 per second, 0:00:20 left",
        "teacher: 800 of 800, done in 0:03:20",
    ]


def test_what_was_done_before_is_no_speed(capsys, clock):
    """A run that continues says at its first step how far it is."""
    with progress_bar("distill", 1000) as advance:
        on_step = counted(advance)
        for step in range(501, 1001):
            clock[0] += 0.5
            on_step(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "distill: 560 of 1000, 2 per second, 0:03:40 left"
    assert lines[-1] == "distill: 1000 of 1000, done in 0:04:10"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stage_that_fails_is_not_called_done(capsys, clock, error):
    with pytest.raises(error), progress_bar("sample", 10) as advance:
        advance(4)
        clock[0] += 3
        raise error
    assert capsys.readouterr().err.splitlines()[1:] == ["sample: stopped at 4 of 10 after 0:00:03"]


def test_a_stage_that_returns_early_is_not_called_done(capsys, clock):
    """As a training does after SIGTERM."""
    with progress_bar("teacher", 10) as advance:
        advance(9)
    assert capsys.readouterr().err.splitlines()[1:] == ["teacher: stopped at 9 of 10 after 0:00:00"]


def test_more_than_all_is_shown_as_all(capsys, clock):
    """Several processes count in whole batches."""
    with progress_bar("sample", 10) as advance:
        advance(16)
    assert capsys.readouterr().err.splitlines()[1:] == ["sample: 10 of 10, done in 0:00:00"]


def test_the_last_advance_is_said_once(capsys, clock):
    with progress_bar("classifier", 1) as advance:
        clock[0] += 78
        advance()
    assert capsys.readouterr().err.splitlines()[1:] == ["classifier: 1 of 1, done in 0:01:18"]


def test_other_processes_say_nothing(capsys):
    with progress_bar("sample", 10, is_main=False) as advance:
        advance(4)
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_slow_stage_has_no_speed_before_two_advances(capsys, clock):
    with progress_bar("latents", 100) as advance:
        for _ in range(2):
            clock[0] += 50
            advance(10)
    assert capsys.readouterr().err.splitlines()[:-1] == [
        "latents: 0 of 100, started",
        "latents: 10 of 100",
        "latents: 20 of 100, 0.2 per second, 0:06:40 left",
    ]


def test_in_a_terminal_it_is_a_bar():
    """stderr is a pseudo-terminal; rich draws there, and nothing goes to stdout."""
    import pty

    ours, theirs = pty.openpty()
    code = "from ard.common.progress import progress_bar\nwith progress_bar('teacher', 4) as a: [a() for _ in range(4)]"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment
    )
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b"" and "\x1b[" in drawn and "━" in drawn and "4/4" in drawn
    assert "started" not in drawn


def test_the_library_needs_neither_typer_nor_rich_for_lines():
    code = (
        "import sys\nsys.modules['typer'] = sys.modules['rich'] = None\nfrom ard.common.progress import progress_bar\n"
    )
    code += "with progress_bar('x', 1) as advance: advance()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["x: 0 of 1, started", "x: 1 of 1, done in 0:00:00"]


def test_one_implementation():
    """The commands and the demo have no bar of their own."""
    folder = Path(progress.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "rich.progress" in path.read_text()] == ["progress.py"]
