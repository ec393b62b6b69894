"""`make gpu-check` without a GPU: crashes, hangs and spent budgets cost a piece of work, and it goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.files import ROOT
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import fastest, machine, processes, sanitize
from benchmarks.gpu.journal import Journal
from benchmarks.results import load_rooms

OP = "block_causal_attention"
# What a killed or hung run may take beyond its minutes.
MARGIN = 25.0
# It hangs before it has imported anything, hears no SIGTERM, and has started what left its session.
HANG_AT_IMPORT = """
import os, signal, subprocess, sys, time
if "benchmarks.gpu.machine" in sys.orig_argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    detached = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    open(os.environ["PIDS"], "a").write(f"{os.getpid()} {detached.pid} ")
    time.sleep(3600)
"""
FAULTY_TESTS = """
import ctypes, time
def test_first(): pass
def test_wrong(): assert 1 == 2, "planted"
def test_crash(): ctypes.string_at(0)
def test_hang(): ctypes.PyDLL(None).sleep(3600)  # with the GIL held, as by a launch behind a kernel that hangs
def test_last(): pass
"""


def gpu_check(out, *arguments, **variables):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=900, check=False
    )


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_dry_run_takes_every_path(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").rglob("*")}
    done = gpu_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").rglob("*")} == before
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: found["status"] for name, found in summary.items()} == dict.fromkeys(driver.NAMES, "passed")
    for name in driver.NAMES[1:]:
        outcomes = [entry["outcome"] for entry in Journal(tmp_path / f"{name}.jsonl").results()]
        assert "passed" in outcomes and "failed" not in outcomes, name
    rooms = load_rooms(tmp_path)
    kernels = [row for room in ("block_causal_attention", "segment_adaln") for row in rooms[room]["rows"]]
    assert {row.facts["backend"] for row in kernels} == {"triton", "cuda"}, "each is timed against the other"
    assert all(row.best_peer and "flash_attn_loop" in row.refused for row in kernels if "attention" in row.op)
    assert {*rooms} >= {"student_sampling", "student_training", "student_compiled", "growth", "history_overhead"}


def pytest_with_journal(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.journal", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder), "--journal", str(folder / "a.jsonl"), "--journal-seconds", "5", *arguments]
    return subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_crash_and_a_hang_cost_their_own_tests(tmp_path):
    (tmp_path / "test_faulty.py").write_text(FAULTY_TESTS)
    done = pytest_with_journal(tmp_path, "-n", "1")
    assert done.returncode == processes.FAILED, done.stdout + done.stderr
    results = {entry["what"].split("::")[1]: entry for entry in Journal(tmp_path / "a.jsonl").results()}
    failed = {name for name, entry in results.items() if entry["outcome"] == "failed"}
    assert failed == {"test_wrong", "test_crash", "test_hang"} and len(results) == 5
    assert "planted" in results["test_wrong"]["why"] and "crashed while running" in results["test_hang"]["why"]
    assert "test_faulty.py" in done.stderr, "where it hung is printed"
    size = (tmp_path / "a.jsonl").stat().st_size
    again = pytest_with_journal(tmp_path, "-n", "1", f"--journal-skip={tmp_path / 'a.jsonl'}:{size}")
    assert (again.returncode == 0 and "5 deselected" in again.stdout) or "no tests ran" in again.stdout, again.stdout


def test_a_journal_is_whole_and_blames_what_had_begun(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    with journal.piece("first", 60) as entry:
        entry["found"] = 1
    with journal.piece("second", 60):
        raise ValueError("wrong")
    assert journal.blame("it ended") is None, "nothing had begun"
    journal.write(begin="third")
    with journal.path.open("a") as file:
        file.write('{"begin": "fou')
    assert journal.blame("it ended") == "third"
    assert [(e["what"], e["outcome"]) for e in journal.results()] == [
        ("first", "passed"), ("second", "failed"), ("third", "failed"),
    ]  # fmt: skip
    assert "ValueError: wrong" in journal.failures()[0]["why"] and journal.results()[0]["found"] == 1


def run_of(tmp_path, command, seconds=60.0):
    """A run of one stage, whose program is `command`; (its status, its journal)."""
    run = driver.Run(tmp_path, time.monotonic() + seconds, True, False)
    stage = driver.Stage("planted", 1, True, "", lambda run, name: ["-c", command])
    return driver.run_stage(run, stage, run.end), Journal(tmp_path / "planted.jsonl")


WORK = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
journal = Journal(Path({path!r}))
for what in ("a", "b", "c"):
    if what not in journal.done():
        with journal.piece(what, {seconds}):
            if what == "b":
                {fault}
sys.exit(9 if journal.failures() else 0)
"""


@pytest.mark.parametrize("fault", ["os._exit(3)", "os.kill(os.getpid(), 11)", "time.sleep(60)", "1 / 0", "pass"])
def test_a_program_goes_on_behind_what_ended_it(tmp_path, fault):
    command = WORK.format(path=str(tmp_path / "planted.jsonl"), seconds=5, fault=fault)
    status, journal = run_of(tmp_path, command)
    outcomes = {entry["what"]: entry["outcome"] for entry in journal.results()}
    assert outcomes == {"a": "passed", "b": "passed" if fault == "pass" else "failed", "c": "passed"}
    assert status == ("passed" if fault == "pass" else "failed")


@pytest.mark.slow
def test_a_stage_is_cut_at_its_end_or_has_crashed_by_itself(tmp_path):
    command = WORK.format(path=str(tmp_path / "planted.jsonl"), seconds=60, fault="time.sleep(60)")
    status, journal = run_of(tmp_path, command, seconds=12.0)
    assert status == "cut" and [entry["what"] for entry in journal.results()] == ["a"], "it is begun again later"
    assert not processes.descendants()
    assert run_of(tmp_path, "raise SystemExit(1)")[0] == "crashed"


def planted_hang(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HANG_AT_IMPORT)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {"PYTHONPATH": paths, "PIDS": str(tmp_path / "pids")}


def test_a_killed_run_leaves_no_process(tmp_path):
    """SIGTERM, as `timeout` sends it, while a stage hangs at its import."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "build", "--out", str(tmp_path / "out")]
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | planted_hang(tmp_path))
    while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith(" ")):
        time.sleep(0.1)
    running.terminate()
    assert running.wait(MARGIN) == 128 + signal.SIGTERM
    started = (tmp_path / "pids").read_text().split()
    assert len(started) == 2 and not any(map(alive, started))


@pytest.mark.slow
def test_a_run_that_hangs_is_over_in_time(tmp_path):
    begin = time.monotonic()
    done = gpu_check(tmp_path / "out", "--minutes", "0.1", "--only", "build", **planted_hang(tmp_path))
    assert time.monotonic() - begin < 6 + MARGIN and done.returncode == 1
    assert not any(map(alive, (tmp_path / "pids").read_text().split()))


@pytest.mark.parametrize("key", ["device", "commit", "torch"])
def test_continuing_a_run_of_something_else_is_refused(tmp_path, key):
    assert machine.write_environment(tmp_path, resumed=False) == ""
    assert machine.write_environment(tmp_path, resumed=True) == ""
    path = tmp_path / "environment.json"
    content = json.loads(path.read_text())
    content["environment"] |= {key: "other", "date": "1999-01-01"}
    path.write_text(json.dumps(content))
    assert f"it was run with {key} other, here" in machine.write_environment(tmp_path, resumed=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "speed"), "--only has 'speed'; expected one of benchmark, environment"),
        (("--minutes", "0"), "minutes is 0.0; expected a number > 0"),
        (("--continue",), "nothing to continue: "),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    done = gpu_check(tmp_path, *arguments)
    assert done.returncode in (1, 2) and message in " ".join(done.stderr.split())


@pytest.mark.parametrize("nvcc", [True, False])
def test_a_cuda_build_that_fails_is_reported_and_leaves_no_old_kernels(tmp_path, monkeypatch, nvcc):
    asked = []

    def output_of(*command, timeout=0, environment=None):
        if "setup.py" not in command:
            return 0, "fine"
        asked.append({name: value for name, value in environment.items() if name.startswith("ARD_")})
        failed = environment["ARD_BUILD_CUDA"] == "1"
        return int(failed), "[1/9] c++ a.cpp\n[2/9] nvcc b.cu\nFAILED: b.o\nb.cu(7): error: no such kernel\n" * failed

    monkeypatch.setattr(machine, "output_of", output_of)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "find_tool", lambda name: f"/usr/local/cuda/bin/{name}" if nvcc else None)
    (tmp_path / "ard_kernels").mkdir()
    (tmp_path / "ard_kernels" / "_C.cpython-312.so").touch()
    journal = Journal(tmp_path / "build.jsonl")
    machine.build(journal)
    assert [variables["ARD_BUILD_CUDA"] for variables in asked] == (["1", "0"] if nvcc else ["0"])
    assert asked[0].get("ARD_CUDA_ARCHS") == ("90a" if nvcc else None), "for the GPU at hand only"
    # Kernels of an earlier build must not be checked in place of those that do not compile.
    assert bool(list((tmp_path / "ard_kernels").glob("_C*.so"))) is not nvcc
    assert ["b.cu(7): error: no such kernel" in entry["why"] for entry in journal.failures()] == [True] * nvcc


WGMMA = "void ard::sm90::attention_forward<__nv_bfloat16, (int)72>(ard::sm90::Params)+0x{}0 in sm90.h:62"
FOUND = f"Error: Race reported between Write access at {WGMMA.format('1a')}"
READ = f"Read access at {WGMMA.format('2b')} [4 hazards]"
OTHER = READ.replace("sm90::attention_forward", "sm80::attention_backward")


@pytest.mark.parametrize(
    "accesses, displayed, end, passes",
    [
        ((FOUND, READ), 1, sanitize.DONE, True),
        ((FOUND, READ, READ), 1, sanitize.DONE, True),
        ((FOUND, OTHER), 1, sanitize.DONE, False),
        ((FOUND, READ, OTHER), 1, sanitize.DONE, False),
        ((FOUND, READ.replace("Read", "Write")), 1, sanitize.DONE, False),
        ((FOUND, READ), 2, sanitize.DONE, False),
        ((FOUND, READ), 1, "Traceback", False),
        (("Error: Potential hazard",), 1, sanitize.DONE, False),
        ((), 0, sanitize.DONE, False),
    ],
)
def test_only_a_reviewed_finding_of_racecheck_passes(monkeypatch, accesses, displayed, end, passes):
    lines = [f"========= {'    and ' * (i > 0)}{access}" for i, access in enumerate(accesses)]
    summary = f"========= RACECHECK SUMMARY: {displayed} hazard displayed (1 error, 0 warnings)"
    text = "\n".join([f"ran {OP} B1", "========= COMPUTE-SANITIZER", *lines, "=========", end, summary])
    monkeypatch.setattr(sanitize, "output_of", lambda *command, **how: (1, text))
    entry = sanitize.watch("racecheck", "cuda", [], 1.0)
    assert (entry["outcome"] == "passed") is bool(entry["reviewed"]) is passes
    assert sanitize.watch("memcheck", "cuda", [], 1.0)["outcome"] == "failed"


SHAPE_CLASS = f"{OP}/16bit/72"


def planted_results(folder, times, commit="abc", **stages):
    """What gpu-check leaves. times: backend -> (forward, backward); stages: those that did not pass."""
    environment = {"device": "H200", "commit": "abc", "dry_run": False}
    summary = {name: {"status": stages.get(name, "passed")} for name in driver.NAMES}
    (folder / "gpu_check.json").write_text(json.dumps(summary))
    gpu = {"major": 9, "minor": 0}
    (folder / "environment.json").write_text(json.dumps({"environment": environment, "gpu": gpu}))
    time_of = {"p20": 1.0, "p80": 1.0, "rounds": 9}
    same = {"op": OP, "dtype": "bfloat16", "shape": "B32", "best_peer": None, "ratio": None, "ratio_by_round": None}
    same |= {"target": 1.0, "met": False, "registered_op": OP, "width": 72}
    rows = [
        same | {"backend": b, "ours": b, "direction": way, "milliseconds": {b: time_of | {"median": ms}}}
        for b, pair in times.items()
        for way, ms in zip(("forward", "backward"), pair, strict=False)
    ]
    (folder / f"{OP}.json").write_text(json.dumps({"environment": environment | {"commit": commit}, "rows": rows}))
    return folder


def test_the_fastest_backend_is_chosen_and_other_architectures_are_kept(tmp_path):
    table = tmp_path / "fastest.json"
    table.write_text(json.dumps({"sources": {"sm80": "a100"}, "backends": {"sm80": {"x": "cuda"}}}))
    fastest.update(planted_results(tmp_path, {"cuda": (1.0, 3.0), "triton": (2.0, 3.0)}), table)
    written = json.loads(table.read_text())
    assert written["backends"] == {"sm80": {"x": "cuda"}, "sm90": {SHAPE_CLASS: "cuda"}}
    assert written["sources"] == {"sm80": "a100", "sm90": str(tmp_path)}


@pytest.mark.parametrize(
    "cuda, winner", [((1.0, 4.5), "triton"), ((1.0, 3.9), "cuda"), ((1.0,), "triton"), ((), "triton")]
)
def test_a_fast_forward_does_not_make_up_for_its_backward(tmp_path, cuda, winner):
    assert fastest.choose(planted_results(tmp_path, {"cuda": cuda, "triton": (2.0, 3.0)})) == {SHAPE_CLASS: winner}


@pytest.mark.parametrize("stage", fastest.MUST_PASS)
def test_nothing_is_chosen_unless_every_check_passed(tmp_path, stage):
    planted_results(tmp_path, {"cuda": (1.0, 1.0), "triton": (2.0, 2.0)}, **{stage: "cut"})
    with pytest.raises(SystemExit, match=f"{stage} did not pass"):
        fastest.choose(tmp_path)


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    planted_results(tmp_path, {"cuda": (1.0, 1.0)}, commit="older")
    with pytest.raises(SystemExit, match="is of commit older"):
        fastest.choose(tmp_path)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "environment"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "torch sees no CUDA GPU" in done.stderr
