"""`python -m benchmarks.gpu` (`make gpu-check`): everything a GPU can tell about the kernels, in a budget of minutes.

Stages run most important first, in processes that this one watches: where a piece of work (a case on one backend)
hangs or crashes, its process is ended, the piece counts as failed, and a new process goes on behind it. All of it is
over after the minutes given, come what may; what was found is in <results>/gpu_check.jsonl (log.py) at any moment, and
--continue goes on there. A stage has its part of the time that is left when it is entered; a piece that it has begun
may take longer. The exit status is 1 if the build or a stage that checks failed.

On a machine without a GPU, --dry-run takes every stage's path on tiny shapes: Triton in its interpreter, the CUDA C++
kernels in testing/emulator.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.log import FINISHED, Found, Log
from benchmarks.gpu.processes import adopt, watched

ROOT = Path(__file__).resolve().parents[2]


class Stage(NamedTuple):
    """`function` is module.name here; stages that check decide the exit status.

    `seconds`: its part of a run of ten minutes, and in proportion of others. `fresh`: it begins a new process.
    """

    name: str
    function: str
    seconds: float
    checks: bool
    purpose: str
    fresh: bool = False


STAGES = (
    Stage("environment", "machine.environment", 15, False, "versions, sizes, copy bandwidth and bf16 matmul rate"),
    Stage("build", "machine.build", 70, True, "the C++ extension with its CUDA kernels, in place"),
    # Its process is the first to import what was built.
    Stage(
        "correctness", "correctness.correctness", 70, True, "values and gradients against fp64, memory poisoned", True
    ),
    Stage("determinism", "correctness.determinism", 25, True, "1000 repeats of every op are bit-equal"),
    Stage("graphs", "graphs.graphs", 45, True, "CUDA graphs and a compiled layer equal eager"),
    Stage("trainer", "trainer.trainer", 60, True, "a small student and GAN fine-tune as on the CPU; resumption"),
    Stage("tune", "tune.tune", 45, False, "the fastest configuration of every Triton kernel"),
    Stage("correctness_tuned", "correctness.correctness", 15, True, "correctness again, as tuned", True),
    Stage("kernels", "kernels.kernels", 80, False, "kernels against their peers", True),  # without the checks' settings
    Stage("student", "student.student", 40, False, "4-step sampling and a training step of DiT-XL/2"),
    Stage("scaling", "scaling.scaling", 20, False, "time and memory over segments and tokens; the time of history"),
    Stage("sanitizer", "sanitize.sanitizer", 160, True, "compute-sanitizer on tiny shapes of every op"),
    Stage("student_compiled", "student.compiled", 200, False, "the training step against compiled code", True),
)
NAMES = tuple(stage.name for stage in STAGES)
GROUPS = {"benchmark": ("environment", "kernels", "student", "scaling", "student_compiled")}
# Without a sign of life for so long a process is ended: torch's start from a cold disk takes 10 to 20 s.
SILENCE = 60.0
EMULATOR_SILENCE = 600.0  # a dry run may have to compile testing/emulator
# Exit status of a stage's process that was not to be started. It has said why.
REFUSED = 3
OVER = "the run's time was over"
MARKS = {"passed": "passed", "failed": "FAILED", "cut": "cut, its time was over", "crashed": "CRASHED"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, help="budget; default the variable GPU_MINUTES, else 10")
    parser.add_argument("--only", help=f"comma-separated: {', '.join((*GROUPS, *NAMES))}")
    parser.add_argument("--continue", action="store_true", dest="resume", help="go on where the last run was cut")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and run each on tiny CPU tensors")
    parser.add_argument("--out", type=Path, help="results folder; default benchmarks/results/<device>")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # in a stage's process: the run's end
    options = parser.parse_args(arguments)
    if options.minutes is None:
        text = os.environ.get("GPU_MINUTES", "10")
        try:
            options.minutes = float(text)
        except ValueError:
            parser.error(f"GPU_MINUTES is {text!r}; expected a number of minutes")
    if not options.minutes > 0:
        parser.error(f"minutes is {options.minutes}; expected a number > 0")
    for name in (options.only or "").split(","):
        if name and name not in NAMES and name not in GROUPS:
            parser.error(f"--only has {name!r}; expected one of {', '.join((*GROUPS, *NAMES))}")
    if options.resume and options.dry_run and not options.out:
        parser.error("--continue of a dry run needs its --out")
    return options


def chosen(only: str | None) -> list[Stage]:
    if not only:
        return list(STAGES)
    names = {name for part in only.split(",") for name in GROUPS.get(part, (part,))}
    return [stage for stage in STAGES if stage.name in names]


def to_do(log: Log, stages: list[Stage]) -> list[Stage]:
    """Those that this run has not left: finished, cut or crashed."""
    found = log.read()
    return [stage for stage in stages if stage.name not in found or found[stage.name].status == "running"]


def run_here(stages: list[Stage], folder: Path, end: float, dry: bool, resumed: bool) -> None:
    """A stage's process: its stage and those behind it, until one begins a new process."""
    faulthandler.register(signal.SIGUSR1)
    import torch

    from benchmarks.gpu import machine, tune
    from benchmarks.gpu.record import Record
    from benchmarks.rows import describe

    log, device = Log(folder), torch.device("cpu") if dry else torch.device("cuda", 0)
    if reason := machine.refusal(device, log, [stage.name for stage in stages], resumed):
        print(f"benchmarks.gpu: {reason}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)
    if dry:
        machine.repair_interpreter()
        print(machine.load_emulator() or "backend cuda: testing/emulator", flush=True)
    elif resumed:
        if machine.build_is_gone(log):  # built on another machine of this kind
            log.forget(["build"])
        tune.restore(log, device)
    stages = to_do(log, stages)
    for i, stage in enumerate(stages):
        if i and stage.fresh:
            return
        print(f"{stage.name}: {stage.purpose}", flush=True)
        now = time.monotonic()
        seconds = (end - now) * stage.seconds / sum(stage.seconds for stage in stages[i:])
        record = Record(stage.name, folder, device, now + seconds)
        try:
            module, function = stage.function.split(".")
            summary = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(record)
        except Exception as error:
            summary = ""
            record.fail(f"the stage raised {describe(error)}")
        if stage.checks and not record.rows and not record.failures:
            record.fail("nothing was checked: no backend of ours serves a case of it")
        status = "cut" if record.cut else "failed" if record.failures else "passed"
        record.close(status, summary)
        print(f"{stage.name}: {MARKS[status]}; {summary}", flush=True)
        torch.compiler.reset()
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()


def child_environment(dry: bool) -> dict[str, str]:
    """What a stage's process needs before it imports torch and triton."""
    variables = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "python"), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms refuse to run without it
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return variables


def run_stages(stages: list[Stage], log: Log, end: float, dry: bool, resumed: bool) -> None:
    """Processes, one after the other, until every stage is finished or crashed, or the time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", ",".join(stage.name for stage in stages)]
    command += ["--out", str(log.path.parent), "--until", str(end)]
    command += ["--dry-run"] * dry + ["--continue"] * resumed
    silence = EMULATOR_SILENCE if dry else SILENCE
    while (waiting := to_do(log, stages) or enter_again(log, stages, ["cut"])) and (start := time.monotonic()) < end:

        def reason_to_end(start=start) -> str:
            found = log.read()
            return overdue([found[stage.name] for stage in stages if stage.name in found], start, end, silence)

        status = watched(command, reason_to_end, cwd=ROOT, env=child_environment(dry))
        log.forget()  # a line that was being written
        if status == REFUSED:
            sys.exit(1)
        settle(log, waiting, to_do(log, stages), status)


def overdue(stages: list[Found], start: float, end: float, silence: float) -> str:
    """Why the process that began at `start` is to be ended now; empty when it is not."""
    now = time.monotonic()
    if now >= end:
        return OVER
    times = [due for stage in stages for due in stage.begun.values()]
    if times and min(times) < now:
        return "still running after the time for it"
    if not times and now - max([start, *(stage.at for stage in stages if stage.at <= now)]) > silence:
        return f"no sign of life for {silence:.0f} s"
    return ""


def settle(log: Log, waiting: list[Stage], left: list[Stage], status: int | str) -> None:
    """A process that was started for `waiting` has ended, and has `left` these: note what it was doing.

    The stage it was in is entered again only behind a piece of work that is to blame.
    """
    found = log.read()
    inside = next((stage for stage in left if stage.name in found and found[stage.name].entered), None)
    if not left or (inside is None and (status == OVER or left != waiting)):
        return  # it has done its part: what is next begins a new process
    stage = (inside or left[0]).name
    doing = list(found[stage].begun)[-1:] if inside else []
    reason = f"its process stopped: {status}" + (f" in {doing[0]}" if doing else "")
    if status == OVER:
        if inside:
            log.write(stage, status="cut", summary=f"{OVER}{' in ' + doing[0] if doing else ''}")
            print(f"{stage}: {MARKS['cut']}", flush=True)
        return
    log.write(stage, failure=reason)
    if doing:
        log.write(stage, crash=doing[0])
        print(f"  {stage} goes on: {reason}", flush=True)
    else:
        log.write(stage, status="crashed", summary=reason)
        print(f"{stage}: CRASHED; {reason}", flush=True)


def results_folder(end: float) -> Path:
    """benchmarks/results/<GPU>; asked in a process of its own, so that this one never holds the GPU."""
    ask = "import sys, torch; from benchmarks.rows import results_folder as f; "
    ask += "open(sys.argv[1], 'w').write(str(f()) if torch.cuda.is_available() else '')"
    with tempfile.NamedTemporaryFile("r") as answer:
        command = [sys.executable, "-c", ask, answer.name]
        status = watched(command, lambda: OVER * (time.monotonic() >= end), cwd=ROOT, env=child_environment(False))
        folder = answer.read()
    if status == OVER:
        sys.exit(f"benchmarks.gpu: {OVER} before torch had named the GPU")
    if status or not folder:
        sys.exit("benchmarks.gpu: torch sees no CUDA GPU; expected one (--dry-run needs none)")
    return Path(folder)


def resume(log: Log, stages: list[Stage]) -> None:
    """Finished stages stay as they are; the others are entered again, behind the work that they have done."""
    if not log.path.is_file():
        sys.exit(f"benchmarks.gpu: nothing to continue: {log.path.parent} has no {Log.NAME}")
    log.forget()  # a line that was being written
    found = log.read()
    if all(stage.name in found and found[stage.name].status in FINISHED for stage in stages):
        sys.exit("benchmarks.gpu: nothing to continue: every stage that was asked for is finished")
    enter_again(log, stages, ["running", "cut", "crashed"])


def enter_again(log: Log, stages: list[Stage], statuses: list[str]) -> list[Stage]:
    """Those in such a state, which from now on are to be gone on with."""
    found = log.read()
    again = [stage for stage in stages if stage.name in found and found[stage.name].status in statuses]
    for stage in again:
        log.write(stage.name, status="running", summary="to be continued")
    return again


def print_summary(stages: list[Stage], log: Log) -> int:
    """A line per stage, and what failed in it; the number of checking stages that failed."""
    print("\nsummary")
    failed, found = 0, log.read()
    for stage in stages:
        result = found.get(stage.name, Found())
        failed += stage.checks and (bool(result.failures) or result.status == "crashed")
        mark = MARKS.get(result.status, MARKS["cut"]) if stage.name in found else "not reached"
        print(f"  {stage.name:<18} {mark:<24} {result.seconds:7.1f} s  {result.summary}")
        for failure in result.failures[:5]:
            print(f"    {failure[:300]}")
        for reason, count in result.facts.get("not_served", {}).items():
            print(f"    not served, {count} cases: {reason}")
    if any(stage.name not in found or found[stage.name].status not in FINISHED for stage in stages):
        print("--continue goes on with what was cut, crashed or not reached")
    return failed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    stages = chosen(options.only)
    if options.until:
        run_here(stages, options.out, options.until, options.dry_run, options.resume)
        return 0
    end = time.monotonic() + options.minutes * 60
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and nothing it started stays
    sys.stdout.reconfigure(line_buffering=True)  # in order with what the stages print
    adopt()
    if options.out is None:
        dry = options.dry_run
        options.out = Path(tempfile.mkdtemp(prefix="gpu-check-")) if dry else results_folder(end)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder)
    if options.resume:
        resume(log, stages)
    else:
        log.forget(NAMES if not options.only else [stage.name for stage in stages])
    print(f"{len(stages)} stages in {options.minutes:g} minutes")
    for stage in stages:
        print(f"  {stage.name:<18} {stage.purpose}")
    run_stages(stages, log, end, options.dry_run, options.resume)
    failed = print_summary(stages, log)
    if options.dry_run:
        print("a dry run on the CPU: no time in it means anything")
    print(f"results in {log.path.relative_to(ROOT) if log.path.is_relative_to(ROOT) else log.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
