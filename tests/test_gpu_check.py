"""`make gpu-check` without a GPU: the dry run takes every stage's path, and a wrong kernel or a spent budget shows."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch

from benchmarks import cases, compare, measure, plots, report
from benchmarks.gpu import checklist, machine
from benchmarks.gpu.record import BROKEN_CONTEXT, Record
from benchmarks.timing import EventTimer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = (
    "environment",
    "build",
    "correctness",
    "determinism",
    "graphs",
    "trainer",
    "tune",
    "sanitizer",
    "correctness_tuned",
    "kernels",
    "student",
    "scaling",
)
BACKENDS = ("cuda", "triton")
OPS = ("block_causal_attention", "history_attention", "adaln_modulate", "gate_residual_adaln", "gate_residual")
# Faults, planted in every Python process of the run.
FAULTS = {
    "adaln_modulate": """
import ard_kernels
honest = ard_kernels.adaln_modulate
def faulty(x, shift, scale, **settings):
    return honest(x, shift, scale, **settings) * 1.05
ard_kernels.adaln_modulate = faulty
""",
    "block_causal_attention cuda": """
from ard_kernels.block_causal_attention import cuda
honest = cuda.forward
def faulty(*inputs):
    out, lse = honest(*inputs)
    return out * 1.05, lse
cuda.forward = faulty
""",
    "adaln cuda backward": """
from ard_kernels.segment_adaln import cuda
honest = cuda.backward
def faulty(*inputs):
    dx, *rest = honest(*inputs)
    return dx if dx is None else dx * 1.05, *rest
cuda.backward = faulty
""",
    "history cuda crash": """
import os, signal
from ard_kernels.history import cuda
cuda.forward = lambda *inputs: os.kill(os.getpid(), signal.SIGSEGV)
""",
}


def plant(folder, fault):
    """The environment of a run with that fault."""
    (folder / "sitecustomize.py").write_text(FAULTS[fault])
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


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
    checked = found["correctness"]
    assert checked["cases"]["ran"] == checked["cases"]["of"] == len(checked["rows"]) == 19
    assert set(checked["not_served"]) == {"cuda: head dim 16 is not compiled; expected one of 64, 72, 80, 96, 128"}
    for name in ("correctness", "determinism", "graphs"):
        assert {(r.get("op"), r["backend"]) for r in found[name]["rows"]} >= {(o, b) for o in OPS for b in BACKENDS}, (
            name
        )
    for backend, row in zip(BACKENDS, found["sanitizer"]["rows"], strict=True):
        assert row["backend"] == backend and set(row["ops"]) == {*OPS, "block_causal_attention_packed"}
    assert "compute-sanitizer --tool memcheck --error-exitcode 1" in done.stdout
    jobs = {(row["shape"], row["direction"], row["backend"]) for row in found["kernels"]["rows"]}
    assert len(jobs) == len(found["kernels"]["rows"]) == 16
    assert {(shape, way) for shape, way, b in jobs if b == "cuda"} == {(s, w) for s, w, b in jobs if b == "triton"}
    for row in found["kernels"]["rows"]:
        peers = {*row["milliseconds"], *row["refused"]} - {*BACKENDS}
        assert len(peers) >= 2, "a peer is timed or refused with its reason, never dropped"
        assert row["best_peer"] in peers and row["ratio"] > 0
        assert row[f"ratio_to_{'triton' if row['backend'] == 'cuda' else 'cuda'}"] > 0
        assert all(row["refused"].values())
    assert all(set(times) == {*BACKENDS} for times in found["kernels"]["shape_classes"].values() if times)
    for word in ("TFLOP/s", "GB/s", "times the", "met", " ms,"):
        assert word not in done.stdout, "no speed of the interpreter is printed"
    timed = {name: found[name] for name in ("kernels", "student", "scaling")}
    schema = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
    for content in timed.values():
        jsonschema.validate(content, schema)
    whole = {name: content for name, content in found.items() if "environment" in content}
    plots.draw("gpu", whole, tmp_path)
    assert compare.main([str(tmp_path), str(tmp_path)]) == 0, "stages that tune or check are no comparisons"
    page = report.page("gpu", whole, {})
    assert "| **ours**" in page and "not timed: flash attn loop" in page
    assert "student_training_step" in report.measured({"gpu": whole})


def test_wrong_results_fail(tmp_path):
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "correctness", **plant(tmp_path, "adaln_modulate"))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)["correctness"]
    assert found["status"] == "failed"
    assert all("adaln_modulate" in failure for failure in found["failures"])
    assert {row["backend"] for row in found["rows"] if "failed" in row} == {*BACKENDS}
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    "fault, ops",
    [
        ("block_causal_attention cuda", {"block_causal_attention"}),
        ("adaln cuda backward", {"adaln_modulate", "gate_residual_adaln"}),
    ],
)
def test_wrong_cuda_results_fail_and_are_not_timed(tmp_path, fault, ops):
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "correctness,kernels", **plant(tmp_path, fault))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)
    rows = found["correctness"]["rows"]
    assert len(rows) == found["correctness"]["cases"]["of"], "the other cases are checked all the same"
    assert {(row["op"], row["backend"]) for row in rows if "failed" in row} == {(op, "cuda") for op in ops}
    kernels = found["kernels"]
    assert all(" on cuda: differs from " in failure for failure in kernels["failures"]) and kernels["failures"]
    timed = {(row["registered_op"], row["direction"]) for row in kernels["rows"] if row["backend"] == "cuda"}
    way = "backward" if "backward" in fault else "forward"
    assert timed and not timed & {(op, way) for op in ops}
    wrong = [row for row in kernels["rows"] if row["registered_op"] in ops and row["direction"] == way]
    assert wrong and all("cuda" in row["refused"] and "cuda" not in row["milliseconds"] for row in wrong)


def test_a_crash_of_a_cuda_kernel_leaves_the_other_checks(tmp_path):
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "correctness,kernels", **plant(tmp_path, "history cuda crash"))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)
    checked = found["correctness"]
    assert checked["status"] == "failed" and len(checked["rows"]) == checked["cases"]["of"] == 19
    failed = [row for row in checked["rows"] if "failed" in row]
    assert {(r["op"], r["backend"], r["failed"]) for r in failed} == {
        ("history_attention", "cuda", "it ended the process")
    }
    assert len(checked["failures"]) == len(failed) == 2, "plain, and with norms"
    assert all("its process stopped: -11 in history_attention" in failure for failure in checked["failures"])
    history = [row for row in found["kernels"]["rows"] if row["op"] == "history_attention"]
    assert [row["backend"] for row in history] == ["triton"]
    assert history[0]["refused"]["cuda"] == "it ended the process"
    assert not list(out.glob("*.progress"))


def test_spent_budget_stops_early_and_keeps_results(tmp_path):
    done = gpu_check(tmp_path, "--only", "correctness,kernels", "--minutes", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    for name in ("correctness", "kernels"):
        assert found[name]["status"] == "cut"
        made = [row["backend"] for row in found[name]["rows"]]
        assert made == [*BACKENDS], "the most important case is always run, on each backend"
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


def record(folder, stage="correctness", device="cpu"):
    return Record(stage, folder, torch.device(device), time.monotonic() + 60)


def test_a_stage_goes_on_behind_what_ended_its_process(tmp_path):
    """Ended pieces are not run again; those around a crash are, the crash itself is not; three crashes are enough."""
    first, ran = record(tmp_path), []
    first.attempt("a on cuda", lambda: first.add({"row": 1}))
    for label in ("job", "b on cuda"):
        first.progress.note("+", label)
    assert first.progress.pieces() == ({"a on cuda"}, [], ["job", "b on cuda"])
    first.progress.note("!", "b on cuda")
    second = record(tmp_path)
    assert second.rows == [{"row": 1}] and not second.given_up("cuda")
    for label in ("a on cuda", "b on cuda", "job", "c on cuda"):
        second.attempt(label, lambda label=label: ran.append(label))
    assert ran == ["job", "c on cuda"]
    case = cases.tiny_case("adaln_modulate")
    assert "triton" in checklist.serving(second, case)
    for label in ("d on cuda", "e on cuda"):
        second.progress.note("!", label)
    third = record(tmp_path)
    assert third.given_up("cuda") and not third.given_up("triton")
    assert checklist.serving(third, case) == ["triton"]
    assert any("cuda" in reason for reason in third.facts["not_served"])


def test_an_error_ends_the_process_only_when_it_broke_the_cuda_context(tmp_path, monkeypatch):
    """With a stand-in for a GPU whose every call fails, then with one that recovers."""
    working, left = record(tmp_path), []
    working.device = torch.device("cuda", 0)

    def leave(status):
        left.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    for broken in (True, False):

        def synchronize(device, broken=broken):
            if broken:
                raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with contextlib.suppress(SystemExit):
            working.attempt("kernel on cuda", lambda: 1 / 0)
        assert left == [BROKEN_CONTEXT]
    assert ["broke the CUDA context" in failure for failure in working.failures] == [True, False]


class Builds:
    """Stands for machine.output_of: setup.py fails when CUDA is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, *command, timeout=0, environment=None):
        if "build_ext" not in command:
            return 0, "fine"
        self.asked.append({name: value for name, value in environment.items() if name.startswith("ARD_")})
        failed = environment["ARD_BUILD_CUDA"] == "1"
        return int(failed), "[1/9] c++ a.cpp\n[2/9] nvcc b.cu\nFAILED: b.o\nb.cu(7): error: no such kernel\n" * failed


@pytest.fixture
def gpu_to_build_for(monkeypatch, tmp_path):
    """A machine with an H200, and a tree whose extension comes from an earlier build."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(Record, "dry", False)
    (tmp_path / "ard_kernels").mkdir()
    (tmp_path / "ard_kernels" / "_C.cpython-312.so").touch()
    builds = Builds()
    monkeypatch.setattr(machine, "output_of", builds)
    made = record(tmp_path / "out", "build")
    made.device = torch.device("cuda", 0)
    return made, builds, tmp_path


def test_a_cuda_build_that_fails_is_reported_and_leaves_no_old_kernels(gpu_to_build_for, monkeypatch, capsys):
    made, builds, root = gpu_to_build_for
    monkeypatch.setattr(machine, "find_tool", lambda name: f"/usr/local/cuda/bin/{name}")
    assert "without CUDA kernels" in machine.build(made)
    assert [asked["ARD_BUILD_CUDA"] for asked in builds.asked] == ["1", "0"]
    assert builds.asked[0]["ARD_CUDA_ARCHS"] == "90a", "for the GPU at hand only"
    assert not list((root / "ard_kernels").glob("_C*.so")), "or the stages would check the kernels of an earlier build"
    assert len(made.failures) == 1 and "b.cu(7): error: no such kernel" in made.failures[0]
    assert "b.cu(7): error" in capsys.readouterr().out and made.facts["cuda_kernels"] is False


def test_without_nvcc_the_build_goes_on_and_says_so(gpu_to_build_for, monkeypatch, capsys):
    made, builds, _ = gpu_to_build_for
    monkeypatch.setattr(machine, "find_tool", lambda name: None)
    assert "without CUDA kernels" in machine.build(made)
    assert [asked["ARD_BUILD_CUDA"] for asked in builds.asked] == ["0"] and not made.failures
    assert "no nvcc" in capsys.readouterr().out


def test_the_odd_one_out_is_the_one_that_others_contradict():
    right, wrong, broken = torch.ones(4), torch.full((4,), 1.1), torch.tensor([1.0, 1.0, 1.0, float("nan")])
    results = {"cuda": [right, wrong], "triton": [right, right], "flash": [right, right], "cudnn": [right, broken]}
    assert set(measure.odd_ones_out(results, 0.01)) == {"cuda", "cudnn"}
    assert "differs from triton" in measure.odd_ones_out(results, 0.01)["cuda"]
