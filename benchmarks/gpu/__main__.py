"""`python -m benchmarks.gpu` (`make gpu-check`): everything a GPU can tell about the kernels, in a budget of minutes.

Stages run most important first, each in a process of its own: a crash or a hang of one leaves the others, and a GPU in
working order. A stage whose process ended is started again behind the piece of work that ended it (a case on one
backend), which counts as failed. What a stage has found is in benchmarks/results/<device>/<stage>.json at any moment.
Time a stage leaves over goes to the next ones. The exit status is 1 if the build or a stage that checks failed.

On a machine without a GPU, --dry-run takes every stage's path on tiny shapes: Triton in its interpreter, the CUDA C++
kernels in tests/emulator.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.files import Progress, results, write_results

ROOT = Path(__file__).resolve().parents[2]


class Stage(NamedTuple):
    """`function` is module.name here, `share` its part of the time; stages that check decide the exit status.

    `least`: seconds it may take whatever its share; what they cost is taken from all later stages.
    """

    name: str
    function: str
    share: float
    checks: bool
    purpose: str
    least: float = 0.0


# nvcc on a few cores: the build is ended after that, and the other backends are checked.
BUILD_SECONDS = 300.0
STAGES = (
    Stage("environment", "machine.environment", 0.03, False, "versions, sizes, copy bandwidth and bf16 matmul rate"),
    Stage("build", "machine.build", 0.05, True, "the C++ extension with its CUDA kernels, in place", BUILD_SECONDS),
    Stage("correctness", "correctness.correctness", 0.15, True, "values and gradients against fp64, memory poisoned"),
    Stage("determinism", "correctness.determinism", 0.05, True, "1000 repeats of every op are bit-equal"),
    Stage("graphs", "graphs.graphs", 0.08, True, "CUDA graphs and a compiled layer equal eager"),
    Stage("trainer", "trainer.trainer", 0.05, True, "a small student and GAN fine-tune as on the CPU; resumption"),
    Stage("tune", "tune.tune", 0.10, False, "the fastest configuration of every Triton kernel"),
    Stage("sanitizer", "sanitize.sanitizer", 0.13, True, "compute-sanitizer on tiny shapes of every op"),
    Stage(
        "correctness_tuned", "correctness.correctness", 0.04, True, "correctness again, with the tuned configurations"
    ),
    Stage("kernels", "kernels.kernels", 0.19, False, "kernels against their peers"),
    Stage("student", "student.student", 0.08, False, "a training step and 4-step sampling of DiT-XL/2"),
    Stage("scaling", "scaling.scaling", 0.05, False, "time and memory over segments and tokens; the time of history"),
)
NAMES = tuple(stage.name for stage in STAGES)
GROUPS = {"benchmark": ("environment", "kernels", "student", "scaling")}
# A stage only looks at its time between two pieces of work: this much later it is ended from outside.
GRACE = 90.0
MARKS = {"passed": "passed", "failed": "FAILED", "cut": "cut, its time was over", "crashed": "CRASHED"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, help="budget; default the variable GPU_MINUTES, else 10")
    parser.add_argument("--only", help=f"comma-separated: {', '.join((*GROUPS, *NAMES))}")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and run each on tiny CPU tensors")
    parser.add_argument("--out", type=Path, help="results folder; default benchmarks/results/<device>")
    parser.add_argument("--stages", help=argparse.SUPPRESS)  # in a stage's own process: run these, here
    options = parser.parse_args(arguments)
    if options.minutes is None:
        text = os.environ.get("GPU_MINUTES", "10")
        try:
            options.minutes = float(text)
        except ValueError:
            parser.error(f"GPU_MINUTES is {text!r}; expected a number of minutes")
    if not options.minutes >= 0:
        parser.error(f"minutes is {options.minutes}; expected a number >= 0")
    for name in (options.only or "").split(","):
        if name and name not in NAMES and name not in GROUPS:
            parser.error(f"--only has {name!r}; expected one of {', '.join((*GROUPS, *NAMES))}")
    return options


def chosen(only: str | None) -> list[Stage]:
    if not only:
        return list(STAGES)
    names = {name for part in only.split(",") for name in GROUPS.get(part, (part,))}
    return [stage for stage in STAGES if stage.name in names]


def seconds_for(stages: list[Stage], left: float) -> float:
    """What the first of `stages` may take of the `left` seconds for all of them."""
    return max(0.0, left * stages[0].share / sum(stage.share for stage in stages), stages[0].least)


def run_here(stages: list[Stage], folder: Path, seconds: float) -> None:
    """Run the stages in this process, one after the other; a single one has all of the `seconds`."""
    import torch

    from benchmarks.gpu.machine import load_emulator, repair_interpreter
    from benchmarks.gpu.record import Record
    from benchmarks.rows import describe

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        repair_interpreter()
        print(load_emulator() or "backend cuda: tests/emulator", flush=True)
    end = time.monotonic() + seconds
    for i, stage in enumerate(stages):
        print(f"{stage.name}: {stage.purpose}", flush=True)
        now = time.monotonic()
        allowed = seconds if len(stages) == 1 else seconds_for(stages[i:], end - now)
        record = Record(stage.name, folder, device, now + allowed)
        try:
            module, function = stage.function.split(".")
            summary = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(record)
            cut = record.seconds_left <= 0
        except Exception as error:
            summary, cut = "", False
            record.fail(f"the stage raised {describe(error)}")
        if stage.checks and not record.rows and not record.failures:
            record.fail("nothing was checked: no backend of ours serves a case of it")
        status = "failed" if record.failures else "cut" if cut else "passed"
        record.close(status, summary)
        print(f"{stage.name}: {MARKS[status]}; {summary}", flush=True)


def child_environment(dry: bool, folder: Path) -> dict[str, str]:
    """What a stage's process needs before it imports torch and triton."""
    variables = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "python"), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms refuse to run without it
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables["ARD_CACHE_DIR"] = str(folder / "cache")
    return variables


def run_child(stages: list[Stage], folder: Path, seconds: float, dry: bool) -> None:
    """Run the stages in one new process, and, when it ends before they do, again behind what has ended it."""
    deadline = time.monotonic() + seconds
    while open_stages := [stage for stage in stages if unfinished(folder, stage)]:
        status = run_process(open_stages, folder, max(0.0, deadline - time.monotonic()), dry)
        begun = [stage for stage in stages if unfinished(folder, stage)]
        if begun:
            blame(begun[0], folder, status, again=time.monotonic() < deadline)


def run_process(stages: list[Stage], folder: Path, seconds: float, dry: bool) -> int | str:
    """Exit status of a process that runs the stages; it is ended when it is far over its time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", ",".join(stage.name for stage in stages)]
    command += ["--out", str(folder), "--minutes", str(seconds / 60), *(["--dry-run"] if dry else [])]
    child = subprocess.Popen(command, cwd=ROOT, env=child_environment(dry, folder), start_new_session=True)
    try:
        return child.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return "ended from outside, far over its time"
    finally:  # also on Ctrl-C: neither the stage nor what it started outlives this command
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def unfinished(folder: Path, stage: Stage) -> bool:
    result = results(folder, stage.name)
    return result is None or result["status"] == "running"


def blame(stage: Stage, folder: Path, status: int | str, again: bool) -> None:
    """Note what a stage was doing when its process ended; it is not started again without such a piece of work."""
    result = results(folder, stage.name) or {"stage": stage.name, "seconds": 0.0, "failures": [], "rows": []}
    progress = Progress(folder, stage.name)
    _, _, doing = progress.pieces()
    reason = f"its process stopped: {status}" + (f" in {doing[-1]}" if doing else "")
    result["failures"].append(reason)
    if doing and again:
        progress.note("!", doing[-1])
        print(f"  {stage.name} goes on: {reason}", flush=True)
    else:
        result |= {"status": "crashed", "summary": reason}
        progress.path.unlink(missing_ok=True)
        print(f"{stage.name}: CRASHED; {reason}", flush=True)
    write_results(folder, stage.name, result)


def results_folder() -> Path:
    """benchmarks/results/<GPU>; asked in a process of its own, so that this one never holds the GPU."""
    ask = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=False)
    device = done.stdout.strip()
    if done.returncode or not device:
        sys.exit("benchmarks.gpu: torch sees no CUDA GPU; expected one (--dry-run needs none)")
    sys.path.insert(0, str(ROOT))
    from benchmarks.rows import RESULTS, slug

    return RESULTS / slug(device)


def print_summary(stages: list[Stage], folder: Path, dry: bool) -> int:
    """A line per stage, a line per target; the number of checking stages that failed."""
    print("\nsummary")
    failed = 0
    for stage in stages:
        result = results(folder, stage.name)
        failed += stage.checks and result["status"] in ("failed", "crashed")
        print(
            f"  {stage.name:<18} {MARKS[result['status']]:<24} {result.get('seconds', 0):7.1f} s  {result['summary']}"
        )
        for failure in result["failures"][:5]:
            print(f"    {failure[:300]}")
        for reason, count in result.get("not_served", {}).items():
            print(f"    not served, {count} cases: {reason}")
    if dry:
        print(f"a dry run on the CPU: no time in it means anything; files in {folder}")
        return failed
    from benchmarks.rows import verdict

    print("\ntargets")
    for name in ("kernels", "student"):
        for row in (results(folder, name) or {"rows": []})["rows"] if name in [s.name for s in stages] else []:
            for target in row["targets"]:
                print(f"  {row['shape']} {row['direction']} {row.get('backend', '')}: {verdict(target)}")
    print(f"results in {folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    seconds = options.minutes * 60
    if options.stages:
        run_here([stage for stage in STAGES if stage.name in options.stages.split(",")], options.out, seconds)
        return 0
    stages, dry = chosen(options.only), options.dry_run
    if dry:
        folder = options.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    else:
        by_device = results_folder()  # also with --out: it makes sure that there is a GPU
        folder = options.out or by_device
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(stages)} stages in {options.minutes:g} minutes")
    for stage in stages:
        for kind in ("json", "progress"):  # of an earlier run
            (folder / f"{stage.name}.{kind}").unlink(missing_ok=True)
        print(f"  {stage.name:<18} {stage.share:4.0%}  {stage.purpose}")
    if dry:
        run_child(stages, folder, seconds, dry)
    else:
        end = time.monotonic() + seconds
        for i, stage in enumerate(stages):
            run_child([stage], folder, seconds_for(stages[i:], end - time.monotonic()), dry)
    return 1 if print_summary(stages, folder, dry) else 0


if __name__ == "__main__":
    sys.exit(main())
