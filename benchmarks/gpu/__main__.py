"""`python -m benchmarks.gpu` (`make gpu-check`): everything a GPU can tell about the kernels, in a budget of minutes.

Stages are commands, most important first: the tests marked `gpu`, the tuner, the benchmarks, compute-sanitizer. Each
has its part of the time that is left when it is entered, and is ended with all that it has started when that is over.
What it finds is in the results folder at any moment: <stage>.jsonl (journal.py), the benchmarks' <room>.json, what it
printed in <stage>.log. A command that dies is started again behind the work that ended it. --continue skips stages
that are finished, and of the others what they have done. The exit status is 1 if the build or a stage that checks
failed.

On a machine without a GPU, --dry-run takes every stage's path on tiny shapes: Triton in its interpreter, the CUDA C++
kernels in testing/emulator.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.files import ROOT, write_json
from benchmarks.gpu.journal import ENDED, Journal
from benchmarks.gpu.processes import FAILED, adopt, output_of, watched
from testing.rooms import GPU_ROOMS, ROOMS

NEEDED = ("torch", "triton", "numpy", "pytest", "xdist", "pytest_benchmark", "hypothesis", "safetensors")
SUMMARY = "gpu_check.json"
MOST_RESTARTS = 20
# A stage that was cut is entered again only if so many seconds of the budget are left.
LEAST_SECONDS = 20.0
QUICK, ALL = "not slow and not exhaustive", "not exhaustive"
OPS = (*(f"tests/{room}" for room in ROOMS), "tests/test_model_sizes.py")
HANDFUL = "tests/block_causal_attention/test_parity.py", "test_layouts_agree"  # tests of a dry run


class Run(NamedTuple):
    """Where a run puts what it finds, until when (of time.monotonic()) it goes on, and how."""

    folder: Path
    end: float
    dry: bool
    resumed: bool

    def file(self, name: str) -> Path:
        return self.folder / name


class Stage(NamedTuple):
    """`command`: arguments of Python, made for a run. Stages that check decide the exit status.

    seconds: its part of a run of ten minutes, and in proportion of others.
    """

    name: str
    seconds: float
    checks: bool
    purpose: str
    command: Callable[[Run, str], list[str]]


def program(module: str, *arguments: str) -> Callable[[Run, str], list[str]]:
    return lambda run, name: ["-m", f"benchmarks.gpu.{module}", *arguments, str(run.folder)]


def pytest_command(run: Run, name: str, seconds: float) -> list[str]:
    journal = ["--journal", str(run.file(f"{name}.jsonl")), "--journal-seconds", str(seconds)]
    return ["-m", "pytest", "-q", "-p", "benchmarks.gpu.journal", "-p", "no:cacheprovider", *journal]


def tests(marked: str, words: str, *paths: str, after: tuple[str, ...] = ()) -> Callable[[Run, str], list[str]]:
    """Tests on the GPU whose names have `words`, but for those that the stages `after` have run.

    A dry run takes a handful of them on the CPU.
    """

    def command(run: Run, name: str) -> list[str]:
        some = " and ".join(filter(None, [words.replace("-on-cuda", ""), HANDFUL[1]]))
        choice = ["-m", QUICK, "-k", some] if run.dry else ["-m", f"gpu and {marked}", "-k", words]
        known = [run.file(f"{stage}.jsonl") for stage in (*after, name)]
        skipped = [f"--journal-skip={path}:{path.stat().st_size}" for path in known if path.is_file()]
        workers = ["-n", "1", f"--max-worker-restart={MOST_RESTARTS}"]
        where = HANDFUL[:1] if run.dry else paths or ("tests",)
        return [*pytest_command(run, name, 600 if run.dry else 90), *workers, *choice, *skipped, *where]

    return command


def benchmarks(*paths: str) -> Callable[[Run, str], list[str]]:
    def command(run: Run, name: str) -> list[str]:
        where = [f"benchmarks/{path}" for path in paths]
        return [*pytest_command(run, name, 600), f"--results={run.folder}", "--partial", *where]

    return command


TRAINING = "student/bench_student_{}.py"
STAGES = (
    Stage("environment", 15, False, "versions, GPU, copy and matmul rates", program("machine", "environment")),
    Stage("build", 70, True, "the extension with its CUDA kernels, in place", program("machine", "build")),
    Stage("values_triton", 80, True, "tests on the GPU, Triton", tests(QUICK, "triton-on-cuda")),
    Stage("values_cuda", 70, True, "tests on the GPU, CUDA C++", tests(QUICK, "cuda-on-cuda")),
    Stage(
        "values_rest", 60, True, "student, trainer and slow tests on the GPU",
        tests(ALL, "", after=("values_triton", "values_cuda")),
    ),
    Stage("self_check", 40, True, "every kernel as users' machines check it", program("machine", "self_check")),
    Stage("tune", 45, False, "the fastest configuration of every Triton kernel", program("tune")),
    Stage("values_tuned", 15, True, "ops on Triton again, as tuned", tests(QUICK, "triton-on-cuda", *OPS)),
    Stage(
        "kernels", 80, False, "kernels against their peers",
        benchmarks(*GPU_ROOMS),
    ),
    Stage(
        "student", 40, False, "4-step sampling and a training step of DiT-XL/2",
        benchmarks(TRAINING.format("sampling"), TRAINING.format("training")),
    ),
    Stage("scaling", 20, False, "growth, the time of history", benchmarks("growth", "history_overhead", "numerics")),
    Stage("sanitizer", 160, True, "compute-sanitizer on tiny shapes of every op", program("sanitize")),
    Stage("student_compiled", 200, False, "the training step compiled", benchmarks(TRAINING.format("compiled"))),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)
GROUPS = {"benchmark": ("kernels", "student", "scaling", "student_compiled")}
AS_TUNED = NAMES[NAMES.index("tune") :]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, help="budget; default the variable GPU_MINUTES, else 10")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join((*GROUPS, *NAMES))}")
    parser.add_argument("--continue", action="store_true", dest="resume", help="go on where the last run was cut")
    parser.add_argument("--dry-run", action="store_true", help="take every stage's path on tiny CPU tensors")
    parser.add_argument("--out", type=Path, help="results folder; default benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        text = os.environ.get("GPU_MINUTES", "10")
        try:
            options.minutes = float(text)
        except ValueError:
            parser.error(f"GPU_MINUTES is {text!r}; expected a number of minutes")
    if not options.minutes > 0:
        parser.error(f"minutes is {options.minutes}; expected a number > 0")
    names = [name for name in options.only.split(",") if name]
    for name in names:
        if name not in NAMES and name not in GROUPS:
            parser.error(f"--only has {name!r}; expected one of {', '.join((*GROUPS, *NAMES))}")
    if options.resume and options.dry_run and not options.out:
        parser.error("--continue of a dry run needs its --out")
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        parser.error(f"this Python has no {', '.join(missing)}")
    chosen = {part for name in names for part in GROUPS.get(name, (name,))} or NAMES
    options.stages = [stage for stage in STAGES if stage.name in {"environment", *chosen}]
    return options


def stage_environment(run: Run, stage: Stage) -> dict[str, str]:
    """Variables of a stage's process. Stages before the tuner run as shipped, whatever was tuned here earlier."""
    variables = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "python"), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables["ARD_CACHE_DIR"] = str(run.file("tuned" if stage.name in AS_TUNED else "shipped"))
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms refuse to run without it
    variables.pop("ARD_TEST_DEVICES", None)
    if run.dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables |= {"ARD_TEST_DEVICES": "cpu", "ARD_BENCH_TINY": "1"}
    return variables


def run_stage(run: Run, stage: Stage, end: float) -> str:
    """passed, failed, cut (its time was over) or crashed (by itself, or more often than it is started again)."""
    journal = Journal(run.file(f"{stage.name}.jsonl"))
    for _ in range(MOST_RESTARTS):
        journal.mend()
        command = stage.command(run, stage.name) + ["--continue"] * (run.resumed and stage.name == "environment")
        status = watched([sys.executable, *command], end, run.file(f"{stage.name}.log"), stage_environment(run, stage))
        if status is None:
            return "cut"
        if status in (0, FAILED):
            return "failed" if journal.failures() else "passed"
        blamed = journal.blame(f"{ENDED}: exit status {status}")
        if blamed is None:
            return "crashed"
        print(f"{stage.name} goes on behind {blamed}, which ended its process: {status}", flush=True)
    return "crashed"


def run_stages(run: Run, stages: list[Stage], summary: dict[str, dict]) -> None:
    """Each in its part of the time; what is left over goes to those that were cut."""
    waiting = [stage for stage in stages if stage.name in ("environment", "build") or not finished(summary, stage)]
    least = 0.0
    while waiting and run.end - time.monotonic() > least:
        for i, stage in enumerate(waiting):
            if (begin := time.monotonic()) >= run.end:
                return
            print(f"{stage.name}: {stage.purpose}", flush=True)
            share = 1.0 if run.dry else stage.seconds / sum(other.seconds for other in waiting[i:])
            status = run_stage(run, stage, begin + (run.end - begin) * share)
            seconds = summary.get(stage.name, {}).get("seconds", 0.0) + time.monotonic() - begin
            summary[stage.name] = {"status": status, "seconds": round(seconds, 1)}
            write_json(run.file(SUMMARY), summary)
            print(f"{stage.name}: {status}", flush=True)
            if stage.name == "environment" and status != "passed":
                sys.exit(1)
            if stage.name == "tune" and not run.dry:
                take_over_tuned(run)
        waiting = [stage for stage in waiting if summary[stage.name]["status"] == "cut"]
        least = LEAST_SECONDS


def finished(summary: dict[str, dict], stage: Stage) -> bool:
    return summary.get(stage.name, {}).get("status") in ("passed", "failed")


def take_over_tuned(run: Run) -> None:
    """The tuner's winners, from the results to where the library finds them."""
    folder = Path(os.environ.get("ARD_CACHE_DIR") or Path.home() / ".cache" / "ard_kernels")
    for table in run.file("tuned").glob("*.json"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / table.name).write_bytes(table.read_bytes())


def print_summary(run: Run, stages: list[Stage], summary: dict[str, dict]) -> int:
    """A line per stage, and what failed in it; the number of checking stages that failed."""
    print("\nsummary")
    for stage in stages:
        found, journal = summary.get(stage.name, {}), Journal(run.file(f"{stage.name}.jsonl"))
        outcomes = [entry["outcome"] for entry in journal.results()]
        counts = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes))
        print(f"  {stage.name:<17} {found.get('status', 'not reached'):<12} {found.get('seconds', 0):7.1f} s  {counts}")
        for entry in journal.failures()[:5]:
            print(f"    {entry['what']}: {entry['why'][-300:]}")
    if not all(finished(summary, stage) for stage in stages):
        print("--continue goes on with what was cut, crashed or not reached")
    return sum(stage.checks and summary.get(stage.name, {}).get("status") in ("failed", "crashed") for stage in stages)


def gpu_results_folder(seconds: float) -> Path:
    """benchmarks/results/<GPU>; asked in a process of its own, so that this one never holds the GPU."""
    ask = "import torch; from benchmarks.results import results_folder as f; "
    ask += "print(f'folder={f()}' if torch.cuda.is_available() else '')"
    status, text = output_of(sys.executable, "-c", ask, timeout=seconds)
    _, found, folder = text.rpartition("folder=")
    if status or not found:
        sys.exit(f"benchmarks.gpu: torch sees no CUDA GPU; expected one (--dry-run needs none)\n{text}")
    return Path(folder)


def prepare(run: Run, stages: list[Stage]) -> dict[str, dict]:
    """Forget what is to be done anew; the stages that are known."""
    known = run.file(SUMMARY)
    if run.resumed and not known.is_file():
        sys.exit(f"benchmarks.gpu: nothing to continue: {run.folder} has no {SUMMARY}")
    summary = json.loads(known.read_text()) if known.is_file() else {}
    for stage in stages:
        if run.resumed and stage.name != "build":  # built on every machine, with what it can use again
            continue
        summary.pop(stage.name, None)
        for suffix in ("jsonl", "log"):
            run.file(f"{stage.name}.{suffix}").unlink(missing_ok=True)
    if not run.resumed:
        for partial in run.folder.glob("*.partial"):
            partial.unlink()
    elif "build" in summary and not list((ROOT / "ard_kernels").glob("_C*.so")):
        sys.exit("benchmarks.gpu: --continue: what was built is not on this machine; add build to --only")
    return summary


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    seconds = options.minutes * 60
    end = time.monotonic() + seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and nothing it started stays
    adopt()
    if options.out is None:
        dry = options.dry_run
        options.out = Path(tempfile.mkdtemp(prefix="gpu-check-")) if dry else gpu_results_folder(seconds)
    run = Run(options.out.resolve(), end, options.dry_run, options.resume)
    run.folder.mkdir(parents=True, exist_ok=True)
    summary = prepare(run, options.stages)
    print(f"{len(options.stages)} stages in {options.minutes:g} minutes, results in {run.folder}", flush=True)
    run_stages(run, options.stages, summary)
    failed = print_summary(run, options.stages, summary)
    if options.dry_run:
        print("a dry run on the CPU: no time in it means anything")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
