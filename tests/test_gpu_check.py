"""`make gpu-check` without a GPU: the dry run takes every stage's path, and a wrong kernel or a spent budget shows."""

import json
import time

import jsonschema
import pytest
import torch
from gpu_runs import ROOT, gpu_check, plant, results

from benchmarks import compare, measure, plots, report
from benchmarks.gpu import __main__ as run
from benchmarks.gpu import checklist, machine, sanitize, trainer
from benchmarks.gpu.record import Record
from benchmarks.timing import EventTimer

RESULTS = ROOT / "benchmarks" / "results"
STAGES = (
    "environment",
    "build",
    "correctness",
    "determinism",
    "graphs",
    "trainer",
    "tune",
    "correctness_tuned",
    "kernels",
    "student",
    "scaling",
    "sanitizer",
    "student_compiled",
)
BACKENDS = ("triton", "cuda")
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
}


def written_results():
    return {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}


def test_dry_run_takes_every_path(tmp_path):
    before = written_results()
    done = gpu_check(tmp_path)  # in GPU_MINUTES, by default ten
    assert done.returncode == 0, done.stdout + done.stderr
    assert written_results() == before, "a dry run writes nothing under benchmarks/results"
    found = results(tmp_path)
    assert tuple(found) == STAGES
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
    timed = {name: found[name] for name in ("kernels", "student", "scaling", "student_compiled")}
    schema = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
    for content in timed.values():
        jsonschema.validate(content, schema)
    assert compare.main([str(tmp_path), str(tmp_path)]) == 0, "stages that tune or check are no comparisons"
    plots.draw("gpu", found, tmp_path)
    page = report.page("gpu", found, {})
    assert "| **ours**" in page and "not timed: flash attn loop" in page
    assert "student_training_step" in report.measured({"gpu": found})


def test_wrong_results_fail(tmp_path):
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "correctness", **plant(tmp_path, FAULTS["adaln_modulate"]))
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
    done = gpu_check(out, "--only", "correctness,kernels", **plant(tmp_path, FAULTS[fault]))
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(Record, "dry", False)
    (tmp_path / "ard_kernels").mkdir()
    (tmp_path / "ard_kernels" / "_C.cpython-312.so").touch()
    builds = Builds()
    monkeypatch.setattr(machine, "output_of", builds)
    (tmp_path / "out").mkdir()
    made = Record("build", tmp_path / "out", torch.device("cpu"), time.monotonic() + 60)
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


class Planned:
    """Stands for a Record on a GPU: notes the pieces of work, and runs none."""

    dry, over, device, rows, crashed = False, False, torch.device("cpu"), (), ()

    def __init__(self):
        self.limits, self.facts = {}, {}

    def attempt(self, label, run, limit=45.0):
        self.limits[label] = limit

    def given_up(self, op, backend):
        return False


def test_the_trainer_compiles_last_and_has_time_for_it(monkeypatch):
    monkeypatch.setattr(trainer, "random_teacher", lambda model: (None, ""))
    monkeypatch.setattr(trainer, "make_trajectories", lambda *arguments: None)
    planned = Planned()
    trainer.trainer(planned)
    *others, last = planned.limits
    assert last == "compiled" and planned.limits[last] >= 90
    assert {"resumption", "GAN fine-tune", "sampling in a CUDA graph"} < set(others)


def test_the_sanitizer_compiles_without_a_tool_first(monkeypatch):
    monkeypatch.setattr(sanitize, "find_tool", lambda name: name)
    monkeypatch.setattr(checklist, "refusal", lambda *arguments: None)
    planned = Planned()
    sanitize.sanitizer(planned)
    order = ["none on triton", "none on cuda", "memcheck on triton", "memcheck on cuda", "racecheck on triton"]
    assert list(planned.limits)[:5] == order and len(planned.limits) == 10
    assert all(limit >= 60 for limit in planned.limits.values())
    (stage,) = run.chosen("sanitizer")
    assert 600 * stage.seconds / sum(stage.seconds for stage in run.STAGES) >= 100


def racecheck_text(*accesses, displayed=1, end=sanitize.DONE):
    lines = [f"========= {'    and ' * (i > 0)}{access}" for i, access in enumerate(accesses)]
    summary = f"========= RACECHECK SUMMARY: {displayed} hazard displayed (1 error, 0 warnings)"
    return "\n".join(["========= COMPUTE-SANITIZER", *lines, "=========", end, summary])


WGMMA = "void ard::sm90::attention_forward<__nv_bfloat16, (int)72>(ard::sm90::Params)+0x{}0 in sm90.h:62"
FOUND = f"Error: Race reported between Write access at {WGMMA.format('1a')}"
READ = f"Read access at {WGMMA.format('2b')} [4 hazards]"
OTHER = READ.replace("sm90::attention_forward", "sm80::attention_backward")


@pytest.mark.parametrize(
    "text, passes",
    [
        (racecheck_text(FOUND, READ), True),
        (racecheck_text(FOUND, READ, READ), True),
        (racecheck_text(FOUND, OTHER), False),
        (racecheck_text(FOUND, READ, OTHER), False),
        (racecheck_text(FOUND, READ.replace("Read", "Write")), False),
        (racecheck_text(FOUND, READ, displayed=2), False),
        (racecheck_text(FOUND, READ, end="Traceback"), False),
        (racecheck_text("Error: Potential hazard"), False),
        (racecheck_text(displayed=0), False),
    ],
)
def test_only_a_reviewed_finding_of_racecheck_passes(monkeypatch, text, passes):
    monkeypatch.setattr(sanitize, "output_of", lambda *command, **how: (1, text))
    row = sanitize.watch("racecheck", "cuda", ["block_causal_attention"], [], 1.0)
    assert row["passed"] is bool(row["reviewed"]) is passes
    assert not sanitize.watch("memcheck", "cuda", ["block_causal_attention"], [], 1.0)["passed"]
