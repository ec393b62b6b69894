"""`python -m benchmarks.gpu.tune`: times a few configurations of every Triton kernel and keeps the winners.

Winners go to `tuning.cache_file()`, where the library finds them, and to the results. Which kernels an op runs is not
listed here: it is what the op asks `tuning.lookup` for, as `tuning.override` notes. Kernels of one call are tuned in
turn, the others at their best so far.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from ard_kernels.common import tuning
from benchmarks.candidates import candidates
from benchmarks.gpu import checklist
from benchmarks.gpu.log import Found, Log
from benchmarks.gpu.record import Record, Unfinished
from benchmarks.measure import relative
from benchmarks.rows import describe
from benchmarks.timing import interleaved, make_timer
from testing import cases
from testing.cases import ADALN, OPS, Case

# A kernel's candidates, each compiled and timed; all kernels of one call.
KERNEL_LIMIT, CASE_LIMIT = 120.0, 300.0


def configurations(key: str, default: dict[str, int], dry: bool) -> list[dict[str, int]]:
    """The default, then the listed ones with the same constants."""
    listed = list(candidates(key))
    if dry:  # the interpreter has no table and no warps
        listed = [{name: 16 for name in default}]
    return [default, *(config for config in listed if config.keys() == default.keys() and config != default)]


def tuned_cases(dry: bool) -> list[Case]:
    """A shape for every table entry worth having, DiT-XL/2 first."""
    if dry:
        return [cases.tiny_case(op) for op in ("block_causal_attention", "history_attention", "gate_residual_adaln")]
    long, short = (256,) * 4, (64,) * 4
    found = [Case(op, 32, long) for op in OPS]
    found += [Case("block_causal_attention", 32, long, D=D) for D in (64, 128)]
    found += [Case("block_causal_attention", 64, short), Case("history_attention", 64, short)]
    found += [Case("block_causal_attention", 32, long, D=D) for D in (96, 32, 256)]
    return found + [Case(op, 32, long, C=C) for C in (384, 2048, 4096) for op in ADALN]


def runs_of(case: Case, backend: str, device: torch.device) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The op on fixed inputs: forward alone, then with its backward where it has one."""
    inputs = cases.make_inputs(case, device)
    if case.op == "history_attention":
        cache = cases.new_cache(case, device)
        return {"forward": lambda: [cases.run_history(case, inputs, backend, cache)]}

    def forward():
        with torch.no_grad():
            return list(cases.run_ours(case, inputs, backend))

    grad_outputs = [torch.randn_like(y) for y in forward()]

    def both():
        outputs = cases.run_ours(case, inputs, backend)
        return [*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs)]

    return {"forward": forward, "forward+backward": both}


def usable(run, key: str, config: dict, best: dict, expected, limit: float) -> str:
    """Why a configuration cannot be used (it does not compile, or gives other results); empty when it can."""
    try:
        with tuning.override({**best, key: config}):
            off = max(relative(a, b) for a, b in zip(run(), expected, strict=True))
        return "" if off <= limit else f"differs from the default by {off:.2e} of the 2-norm"
    except Exception as error:  # OutOfResources, or the compiler gives up
        return describe(error)


def tune_kernel(record: Record, case: Case, what: str, run, key: str, default: dict, best: dict) -> None:
    """Time the usable candidates of one kernel and put the fastest into `best`."""
    expected = [x.clone() for x in run()]
    limit = 4 * torch.finfo(case.dtype).eps
    runs, refused, configs = {}, {}, {}
    for config in configurations(key, default, record.dry):
        if configs and record.seconds_left <= 0:
            break
        label = json.dumps(config, sort_keys=True)
        reason = usable(run, key, config, best, expected, limit)
        if reason:
            refused[label] = reason
            continue

        def timed(config=config):
            with tuning.override({**best, key: config}):
                run()

        runs[label], configs[label] = timed, config
    if not runs:
        raise RuntimeError(f"{key}: no candidate could be used: {refused}")
    repeats = (2, 1) if record.dry else (20, 3)
    timings = interleaved(runs, *repeats, timer=make_timer(record.device), seconds=3.0)
    winner = min(timings, key=lambda label: timings[label].median)
    best[key] = configs[winner]
    milliseconds = {label: timing.median for label, timing in timings.items()}
    row = {"key": key, "case": f"{case.label} {what}", "default": default, "winner": configs[winner]}
    row |= {"milliseconds": milliseconds, "refused": refused}
    record.add(row, f"{key}: {configs[winner]}, default {default}")


def restore(log: Log, device: torch.device) -> None:
    """What the tune stage of the run has found so far goes where the library finds it, on a fresh machine too."""
    keep({row["key"]: row["winner"] for row in log.read().get("tune", Found()).rows}, device)


def keep(best: dict, device: torch.device) -> None:
    """The winners, added to those of earlier runs."""
    if not best or device.type == "cpu":
        return
    path = tuning.cache_file(device)
    earlier = json.loads(path.read_text())["configs"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    table = {"device": torch.cuda.get_device_name(device), "configs": earlier | best}
    partial.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(partial, path)


def tune(record: Record) -> str:
    """Every kernel of `tuned_cases` until the time is over."""
    best = {row["key"]: row["winner"] for row in record.rows}  # of a process that was interrupted
    torch.manual_seed(0)
    for case in tuned_cases(record.dry):
        if "triton" not in checklist.serving(record, case) or record.over:
            continue

        def run_case(case=case):
            for what, run in runs_of(case, "triton", record.device).items():
                with tuning.override({}) as asked:
                    run()
                for key, default in asked.items():
                    if key in best:
                        continue
                    if record.over:
                        raise Unfinished
                    work = partial(tune_kernel, record, case, what, run, key, default, best)
                    record.attempt(key, work, KERNEL_LIMIT)
                    keep(best, record.device)

        record.attempt(f"{case.label} on triton", run_case, CASE_LIMIT)
    return f"{len(best)} kernel keys tuned"


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", "tune", *sys.argv[1:]]))
