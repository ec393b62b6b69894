"""`python -m benchmarks.gpu` (`make gpu-check`): everything a GPU can tell about the kernels, in a budget of minutes.

Stages run most important first, each in a process of its own: a crash or a hang of one leaves the others, and a GPU in
working order. What a stage has found is in benchmarks/results/<device>/<stage>.json at any moment. Time a stage leaves
over goes to the next ones. The exit status is 1 if a stage that checks correctness failed.

On a machine without a GPU, --dry-run takes every stage's path on tiny shapes, through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Stage(NamedTuple):
    """`function` is module.name here, `share` its part of the time; stages that check decide the exit status."""

    name: str
    function: str
    share: float
    checks: bool
    purpose: str


STAGES = (
    Stage("environment", "machine.environment", 0.03, False, "versions, sizes, copy bandwidth and bf16 matmul rate"),
    Stage("build", "machine.build", 0.05, False, "the C++ extension in place, the doctor's report"),
    Stage("correctness", "correctness.correctness", 0.20, True, "values and gradients against fp64, memory poisoned"),
    Stage("determinism", "correctness.determinism", 0.05, True, "1000 repeats of every op are bit-equal"),
    Stage("graphs", "graphs.graphs", 0.08, True, "CUDA graphs and a compiled layer equal eager"),
    Stage("tune", "tune.tune", 0.15, False, "the fastest configuration of every Triton kernel"),
    Stage("sanitizer", "sanitize.sanitizer", 0.10, True, "compute-sanitizer on tiny shapes of every op"),
    Stage(
        "correctness_tuned", "correctness.correctness", 0.04, True, "correctness again, with the tuned configurations"
    ),
    Stage("kernels", "kernels.kernels", 0.22, False, "kernels against their peers"),
    Stage("student", "student.student", 0.08, False, "a training step and 4-step sampling of DiT-XL/2"),
)
NAMES = tuple(stage.name for stage in STAGES)
GROUPS = {"benchmark": ("environment", "kernels", "student")}
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


def run_here(stages: list[Stage], folder: Path, seconds: float) -> None:
    """Run the stages in this process, one after the other, each with its share of `seconds`."""
    import torch

    from benchmarks.gpu.record import Record, describe

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    begin, whole, before = time.monotonic(), sum(stage.share for stage in stages), 0.0
    for stage in stages:
        before += stage.share
        print(f"{stage.name}: {stage.purpose}", flush=True)
        record = Record(stage.name, folder, device, begin + seconds * before / whole)
        try:
            module, function = stage.function.split(".")
            summary = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(record)
            cut = record.seconds_left <= 0
        except Exception as error:
            summary, cut = "", False
            record.fail(f"the stage raised {describe(error)}")
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
    """Run the stages in one new process; end it when it is far over its time, and mark what it left unfinished."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", ",".join(stage.name for stage in stages)]
    command += ["--out", str(folder), "--minutes", str(seconds / 60), *(["--dry-run"] if dry else [])]
    child = subprocess.Popen(command, cwd=ROOT, env=child_environment(dry, folder), start_new_session=True)
    try:
        status = child.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        status = "ended from outside, far over its time"
    finally:  # also on Ctrl-C: neither the stage nor what it started outlives this command
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    for stage in stages:
        result = read(folder, stage.name)
        if result is None or result["status"] == "running":
            result = (result or {"stage": stage.name, "failures": [], "rows": []}) | {"status": "crashed"}
            result["summary"] = f"its process stopped: {status}"
            (folder / f"{stage.name}.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"{stage.name}: CRASHED; {result['summary']}", flush=True)


def read(folder: Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def results_folder() -> Path:
    """benchmarks/results/<GPU>; asked in a process of its own, so that this one never holds the GPU."""
    ask = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=False)
    device = done.stdout.strip()
    if done.returncode or not device:
        sys.exit("benchmarks.gpu: torch sees no CUDA GPU; expected one (--dry-run needs none)")
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import RESULTS, slug

    return RESULTS / slug(device)


def print_summary(stages: list[Stage], folder: Path, dry: bool) -> int:
    """A line per stage, a line per target; the number of checking stages that failed."""
    print("\nsummary")
    failed = 0
    for stage in stages:
        result = read(folder, stage.name)
        failed += stage.checks and result["status"] in ("failed", "crashed")
        print(
            f"  {stage.name:<18} {MARKS[result['status']]:<24} {result.get('seconds', 0):7.1f} s  {result['summary']}"
        )
        for failure in result["failures"][:5]:
            print(f"    {failure[:300]}")
    if dry:
        print(f"a dry run on the CPU: no time in it means anything; files in {folder}")
        return failed
    from benchmarks.gpu.kernels import verdict

    print("\ntargets")
    for name in ("kernels", "student"):
        for row in (read(folder, name) or {"rows": []})["rows"] if name in [s.name for s in stages] else []:
            for target in row["targets"]:
                print(f"  {row['shape']} {row['direction']}: {verdict(target)}")
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
        (folder / f"{stage.name}.json").unlink(missing_ok=True)  # of an earlier run
        print(f"  {stage.name:<18} {stage.share:4.0%}  {stage.purpose}")
    if dry:
        run_child(stages, folder, seconds, dry)
    else:
        begin, whole, before = time.monotonic(), sum(stage.share for stage in stages), 0.0
        for stage in stages:
            before += stage.share
            left = begin + seconds * before / whole - time.monotonic()
            run_child([stage], folder, max(0.0, left), dry)
    return 1 if print_summary(stages, folder, dry) else 0


if __name__ == "__main__":
    sys.exit(main())
