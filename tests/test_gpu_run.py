"""How `make gpu-check` runs its stages: hangs, crashes and spent budgets cost a piece of work, and it goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from gpu_runs import ROOT, gpu_check, plant, results

from benchmarks.gpu import __main__ as run
from benchmarks.gpu import checklist, machine, processes
from benchmarks.gpu.log import Log
from benchmarks.gpu.record import BROKEN_CONTEXT, Record, Unfinished
from testing import cases

CPU = torch.device("cpu")
# What a killed or hung run may take beyond its minutes.
MARGIN = 15.0
# history_attention on cuda crashes, and with norms it hangs; pieces of work may take 6 s.
CRASH_AND_HANG = """
import os, signal, time
from ard_kernels.history_attention import cuda
from benchmarks.gpu.record import Record
def faulty(*inputs, **named):
    if inputs[10] is not None:
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGSEGV)
cuda.forward = faulty
Record.attempt.__defaults__ = (6.0,)
"""
# The same crash, and of the kernel benchmarks only the last job, which is history attention.
CRASH_IN_A_JOB = """
import os, signal
from ard_kernels.history_attention import cuda
from benchmarks import jobs
cuda.forward = lambda *inputs, **named: os.kill(os.getpid(), signal.SIGSEGV)
all_jobs = jobs.gpu_jobs
jobs.gpu_jobs = lambda dry: all_jobs(dry)[-1:]
"""
# It hangs before it has imported anything, hears no SIGTERM, and has started what left its session.
HANG_AT_IMPORT = """
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
detached = subprocess.Popen(["sleep", "3600"], start_new_session=True)
open(os.environ["PIDS"], "a").write(f"{os.getpid()} {detached.pid} ")
time.sleep(3600)
"""


def record(folder, stage="correctness", device=CPU, seconds=60.0):
    return Record(stage, folder, device, time.monotonic() + seconds)


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_crash_and_a_hang_cost_their_own_cases(tmp_path):
    out = tmp_path / "out"
    planted = plant(tmp_path, CRASH_AND_HANG, stages_only=True)
    done = gpu_check(out, "--only", "correctness,determinism", "--minutes", "6", **planted)
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(out)
    checked = found["correctness"]
    assert checked["status"] == "failed" and len(checked["rows"]) == checked["cases"]["of"] == 19
    failed = [row for row in checked["rows"] if "failed" in row]
    assert [(r["op"], r["backend"], r["failed"]) for r in failed] == 2 * [
        ("history_attention", "cuda", "it ended the process")
    ]
    crash, hang = checked["failures"]
    assert "its process stopped: -11 in history_attention" in crash
    assert "its process stopped: still running after the time for it in history_attention" in hang and "rms" in hang
    assert "fault.py" in done.stderr, "where it hung is printed"
    assert {row["backend"] for row in checked["rows"][:2]} == {"triton", "cuda"}
    assert checked["rows"][0]["backend"] == "triton", "cuda, the riskier one, is last"
    determined = {(row["op"], row["backend"]) for row in found["determinism"]["rows"]}
    assert len(found["determinism"]["rows"]) == 11 and ("history_attention", "cuda") not in determined
    assert any("has ended 2 processes" in reason for reason in found["determinism"]["not_served"])


def test_a_crash_in_a_job_costs_its_candidate(tmp_path):
    out = tmp_path / "out"
    done = gpu_check(out, "--only", "kernels", "--minutes", "6", **plant(tmp_path, CRASH_IN_A_JOB, stages_only=True))
    (row,) = results(out)["kernels"]["rows"]
    assert done.returncode == 0 and results(out)["kernels"]["status"] == "failed", "benchmarks are no checks"
    assert row["backend"] == "triton" and row["best_peer"] and row["refused"]["cuda"] == "it ended the process"


def test_a_run_ends_by_its_minutes_and_continues(tmp_path):
    begin = time.monotonic()
    first = gpu_check(tmp_path, "--minutes", "0.4")
    assert time.monotonic() - begin < 24 + MARGIN, first.stdout
    assert "--continue goes on with" in first.stdout and "not reached" in first.stdout
    before = results(tmp_path)
    second = gpu_check(tmp_path, "--continue", "--only", "environment,build,correctness,determinism", "--minutes", "6")
    assert second.returncode == 0, second.stdout + second.stderr
    found = results(tmp_path)
    for name in ("environment", "build", "correctness", "determinism"):
        assert found[name]["status"] == "passed"
        rows = before.get(name, {"rows": []})["rows"]
        assert found[name]["rows"][: len(rows)] == rows, "what was done is not done again"
    made = [(row["case"], row["backend"]) for row in found["correctness"]["rows"]]
    assert len(made) == len(set(made)) == found["correctness"]["cases"]["of"]
    assert len(found["determinism"]["rows"]) == 12
    third = gpu_check(tmp_path, "--continue", "--only", "correctness,determinism")
    assert third.returncode == 1 and "nothing to continue: every stage" in third.stderr


def test_a_stage_that_hangs_at_import_is_over_in_time_with_all_it_started(tmp_path):
    out, pids = tmp_path / "out", tmp_path / "pids"
    begin = time.monotonic()
    done = gpu_check(out, "--minutes", "0.1", PIDS=str(pids), **plant(tmp_path, HANG_AT_IMPORT, stages_only=True))
    assert time.monotonic() - begin < 6 + MARGIN
    assert done.returncode == 0 and "not reached" in done.stdout, "nothing was found to be wrong"
    started = pids.read_text().split()
    assert len(started) == 2 and not any(map(alive, started))


def test_a_killed_run_leaves_no_process_and_continues(tmp_path):
    """SIGTERM, as `timeout` sends it; then a torn last line, as of a machine that went away."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "environment,build", "--out", tmp_path]
    pids = tmp_path / "pids"
    planted = plant(tmp_path, HANG_AT_IMPORT, stages_only=True)
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | planted | {"PIDS": str(pids)})
    while not (pids.exists() and pids.read_text().endswith(" ")):
        time.sleep(0.1)
    running.terminate()
    assert running.wait(20) == 128 + signal.SIGTERM
    assert not any(map(alive, pids.read_text().split()))
    out = tmp_path / "out"
    interrupted = record_of_interrupted_stage(out)
    done = gpu_check(out, "--only", "environment", "--continue", "--minutes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)["environment"]
    assert found["status"] == "passed" and found["rows"][0] == interrupted and len(found["rows"]) == 2


def record_of_interrupted_stage(out):
    """A log that ends inside the stage environment, in the middle of a line; its one row."""
    out.mkdir()
    interrupted = record(out, "environment")
    interrupted.add({"ceilings": {"copy_GB_per_s": 1.0, "matmul_bf16_TFLOP_per_s": 1.0}})
    interrupted.log.write("environment", begin="rates", limit=45.0)
    with interrupted.log.path.open("a") as file:
        file.write('{"stage": "environment", "row": {"cei')
    return interrupted.rows[0]


@pytest.mark.parametrize("key", ["device", "commit", "torch", "triton"])
def test_continuing_a_run_of_something_else_is_refused(tmp_path, key):
    made = record(tmp_path)
    names = ["correctness", "kernels"]
    assert machine.refusal(CPU, made.log, names, resumed=True) == ""
    made.log.write("kernels", environment=made.environment | {key: "other", "date": "1999-01-01"})
    reason = machine.refusal(CPU, made.log, names, resumed=True)
    assert (
        f"the stage kernels was run with {key} other, here {made.environment[key]}" in reason and "date" not in reason
    )
    assert machine.refusal(CPU, made.log, names, resumed=False) == ""
    if key == "commit":  # all the way
        done = gpu_check(tmp_path, "--continue", "--only", "kernels", "--minutes", "2")
        assert done.returncode == 1 and "a run without --continue begins anew" in done.stderr


def test_kernels_that_were_built_on_another_machine_are_built_again(tmp_path):
    made = record(tmp_path, "build")
    made.facts["cuda_kernels"] = True
    made.close("passed", "")
    assert machine.build_is_gone(made.log)
    assert "add build to --only" in machine.refusal(CPU, made.log, ["kernels"], resumed=True)
    assert machine.refusal(CPU, made.log, ["build", "kernels"], resumed=True) == ""
    made.close("failed", "")
    assert not machine.build_is_gone(made.log)


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
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch sees no CUDA GPU" in done.stderr


def test_a_stage_goes_on_behind_what_ended_its_process(tmp_path):
    """Ended pieces are not run again; those around a crash are, the crash itself is not; those left are, later."""
    first, ran = record(tmp_path), []
    first.attempt("a on cuda", lambda: first.add({"row": 1}))
    for label in ("job", "b on cuda"):
        first.log.write("correctness", begin=label, limit=1.0)
    found = first.log.read()["correctness"]
    assert (found.ended, found.crashed, list(found.begun)) == ({"a on cuda"}, [], ["job", "b on cuda"])
    stage = [stage for stage in run.STAGES if stage.name == "correctness"]
    run.settle(first.log, stage, stage, -11)
    second = record(tmp_path)
    assert second.rows == [{"row": 1}] and second.failures == ["its process stopped: -11 in b on cuda"]

    def leave():
        ran.append("left")
        raise Unfinished

    for label in ("a on cuda", "b on cuda", "job", "c on cuda"):
        second.attempt(label, lambda label=label: ran.append(label))
    second.attempt("d on cuda", leave)
    assert ran == ["job", "c on cuda", "left"] and second.cut and len(second.failures) == 1
    record(tmp_path).attempt("d on cuda", lambda: ran.append("again"))
    assert ran[-1] == "again"


def test_a_process_that_hangs_when_its_work_is_done_is_no_stages_fault(tmp_path):
    stages = run.chosen("environment,build,correctness")
    done = record(tmp_path, "environment")
    done.close("passed", "")
    run.settle(done.log, stages, stages[1:], "no sign of life for 60 s")
    assert list(done.log.read()) == ["environment"]
    run.settle(done.log, stages[1:], stages[1:], "no sign of life for 60 s")
    assert done.log.read()["build"].status == "crashed", "it never began: not tried again"
    run.settle(done.log, stages[2:], stages[2:], run.OVER)
    assert list(done.log.read()) == ["environment", "build"], "the time was over: nobody's fault"


def test_an_op_that_keeps_ending_processes_is_left_out_of_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checklist, "refusal", lambda *arguments: None)
    first, case = record(tmp_path), cases.tiny_case("gate_residual")
    first.log.write("correctness", crash="gate_residual B1 on cuda")
    first.log.write("correctness", crash="gate_residual_adaln B1 on cuda")
    assert checklist.serving(record(tmp_path, "determinism"), case) == ["triton", "cuda"]
    first.log.write("correctness", crash="gate_residual B2 on cuda")
    later = record(tmp_path, "determinism")
    assert checklist.serving(later, case) == ["triton"]
    assert checklist.serving(later, cases.tiny_case("gate_residual_adaln")) == ["triton", "cuda"]
    assert any("cuda: gate_residual is not run any more" in reason for reason in later.facts["not_served"])


def test_a_process_takes_one_piece_whatever_the_time(tmp_path):
    spent = record(tmp_path, seconds=0.0)
    assert not spent.over
    spent.attempt("a", lambda: spent.add({"row": 1}))
    assert spent.over and spent.cut
    again = record(tmp_path, seconds=0.0)
    again.attempt("a", lambda: again.add({"row": 2}))
    assert not again.over and again.rows == [{"row": 1}]


def test_when_a_process_is_ended(tmp_path):
    working, now = record(tmp_path), time.monotonic()

    def reason(start=now, end=now + 100, silence=60.0):
        return run.overdue([working.log.read()["correctness"]], start, end, silence)

    assert reason() == ""
    assert reason(end=now - 1) == run.OVER
    assert reason(start=now - 100, silence=0.0) == "no sign of life for 0 s"
    with working.piece("a", 1000.0):
        assert reason(silence=0.0) == "", "a piece of work has its own time"
        with working.piece("b", -1.0):
            assert reason() == "still running after the time for it"
    assert reason() == ""


def test_the_time_a_stage_leaves_over_goes_to_those_that_were_cut(tmp_path):
    log = Log(tmp_path)
    stages = run.chosen("correctness,graphs")
    for stage, status in zip(stages, ("cut", "crashed"), strict=True):
        record(tmp_path, stage.name).close(status, "")
    assert run.to_do(log, stages) == []
    assert [stage.name for stage in run.enter_again(log, stages, ["cut"])] == ["correctness"]
    assert run.to_do(log, stages) == stages[:1]


def test_what_detached_itself_is_ended_too():
    quiet = "stdout=s.DEVNULL, stderr=s.DEVNULL, start_new_session=True"
    code = f"import subprocess as s; print(s.Popen(['sleep', '3600'], {quiet}).pid)"
    script = f"""
import subprocess, sys
from benchmarks.gpu import processes
processes.adopt()
orphan = subprocess.run([sys.executable, "-c", {code!r}], capture_output=True, text=True).stdout.strip()
assert int(orphan) in processes.descendants()
processes.end_descendants()
assert not processes.descendants()
print(orphan)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not alive(done.stdout.strip())
    assert processes.ENDING_SECONDS < MARGIN


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
            working.attempt(f"kernel, {broken}, on cuda", lambda: 1 / 0)
        assert left == [BROKEN_CONTEXT]
    assert ["broke the CUDA context" in failure for failure in working.failures] == [True, False]


def test_another_package_of_the_name_does_not_win(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('another package')")
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    code = "import benchmarks.gpu; print(benchmarks.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path.parent, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(ROOT / "benchmarks" / "__init__.py"), done.stderr


def test_the_log_is_whole_at_any_moment(tmp_path):
    made = record(tmp_path)
    made.add({"row": 1})
    with made.log.path.open("a") as file:
        file.write('{"stage": "correctness", "ro')
    assert made.log.read()["correctness"].rows == [{"row": 1}]
    made.log.forget()
    made.add({"row": 2})
    assert record(tmp_path).rows == [{"row": 1}, {"row": 2}]
    made.log.forget(["correctness"])
    assert made.log.events() == [] and json.dumps(made.log.read()) == "{}"
