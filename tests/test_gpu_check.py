"""`make gpu-check` without a GPU: the dry run takes every stage's path, and a wrong kernel or a spent budget shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = (
    "environment",
    "build",
    "correctness",
    "determinism",
    "graphs",
    "tune",
    "sanitizer",
    "correctness_tuned",
    "kernels",
    "student",
)
# A fault in one op, planted in every Python process of the run.
FAULT = """
import ard_kernels
honest = ard_kernels.adaln_modulate
def faulty(x, shift, scale, **settings):
    return honest(x, shift, scale, **settings) * 1.05
ard_kernels.adaln_modulate = faulty
"""


def gpu_check(out, *arguments, **variables):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def written_results():
    return {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}


def test_dry_run_takes_every_path(tmp_path):
    before = written_results()
    done = gpu_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert written_results() == before, "a dry run writes nothing under benchmarks/results"
    found = results(tmp_path)
    assert set(found) == {*STAGES, "tuned"}
    for name in STAGES:
        assert name in done.stdout
        assert found[name]["status"] == "passed", found[name]
        assert found[name]["environment"]["dry_run"] is True
        assert found[name]["rows"], name
    assert found["correctness"]["cases"]["ran"] == found["correctness"]["cases"]["of"]
    assert "compute-sanitizer --tool memcheck --error-exitcode 1" in done.stdout
    for row in found["kernels"]["rows"]:
        peers = {*row["milliseconds"], *row["refused"]} - {"ours"}
        assert len(peers) >= 2, "a peer is timed or refused with its reason, never dropped"
        assert all(row["refused"].values())
    for word in ("TFLOP/s", "GB/s", "times the", "met"):
        assert word not in done.stdout, "no speed of the interpreter is printed"


def test_wrong_results_fail(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "correctness", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)["correctness"]
    assert found["status"] == "failed"
    assert all("adaln_modulate" in failure for failure in found["failures"])
    assert "FAILED" in done.stdout


def test_spent_budget_stops_early_and_keeps_results(tmp_path):
    done = gpu_check(tmp_path, "--only", "correctness,kernels", "--minutes", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    for name in ("correctness", "kernels"):
        assert found[name]["status"] == "cut"
        assert len(found[name]["rows"]) == 1, "the most important row is always made"
    assert found["correctness"]["cases"]["of"] > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "speed"), "--only has 'speed'; expected one of benchmark, environment"),
        (("--minutes", "-1"), "minutes is -1.0; expected a number >= 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    done = gpu_check(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch sees no CUDA GPU" in done.stderr


def test_event_timer_queues_the_work_behind_a_pause(monkeypatch):
    """Order of what is sent to the GPU: pause, start event, the work, stop event."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu.timing import EventTimer

    sent = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            sent.append("event")

        def elapsed_time(self, other):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: sent.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: sent.append("pause"))
    assert EventTimer(torch.device("cuda", 0))(lambda: sent.append("work")) == 1.5
    assert sent == ["wait", "pause", "event", "work", "event", "wait"]
