"""`python -m benchmarks.gpu.tune FOLDER`: times a few configurations of every Triton kernel and keeps the winners.

They go to `tuning.cache_file()`, where the library finds them, and to FOLDER/tune.jsonl, behind which it goes on. Which
kernels an op runs is not listed here: it is what `tuning.override` saw asked for. Kernels of one call are tuned in
turn, the others at their best so far.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ard_kernels.common import tuning
from ard_kernels.common.backends import refusal
from ard_kernels.common.tuning import Config
from benchmarks.candidates import candidates
from benchmarks.exact import relative
from benchmarks.files import write_json
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.machine import simulate
from benchmarks.gpu.processes import FAILED
from benchmarks.measure import describe
from benchmarks.timing import DEVICE, TINY, interleaved, make_timer
from testing import cases
from testing.cases import ADALN, NORM_ROPE, OPS, Case

KERNEL_SECONDS = 120.0  # for a kernel's candidates, each compiled and timed


def configurations(key: str, default: Config) -> list[Config]:
    """The default, then the listed ones with the same constants."""
    listed = [dict.fromkeys(default, 16)] if TINY else candidates(key)  # the interpreter has no warps
    return [default, *(config for config in listed if config.keys() == default.keys() and config != default)]


def tuned_cases() -> list[Case]:
    """A shape for every table entry worth having, DiT-XL/2 first."""
    if TINY:
        ops = ("block_causal_attention", "history_attention", "gate_residual_adaln")
        return [*map(cases.tiny_case, ops), Case(NORM_ROPE, 1, (4,), H=2, D=16)]
    long, short = (256,) * 4, (64,) * 4
    found = [Case(op, 32, long) for op in OPS]
    found += [Case("block_causal_attention", 32, long, D=D) for D in (64, 128)]
    found += [Case("block_causal_attention", 64, short), Case("history_attention", 64, short)]
    found += [Case("block_causal_attention", 32, long, D=D) for D in (96, 32, 256)]
    heads = ((16, 64, "head"), (12, 128, "all"), (24, 128, "head"), (40, 128, "all"))
    found += [Case(NORM_ROPE, 8, (1024,), H=H, D=D, over=over) for H, D, over in heads]
    return found + [Case(op, 32, long, C=C) for C in (384, 2048, 4096) for op in ADALN]


def runs_of(case: Case) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The op on fixed inputs: forward alone, then with its backward where it has one."""
    inputs = cases.make_inputs(case, DEVICE)
    if case.op == "history_attention":
        cache = cases.new_cache(case, DEVICE)
        return {"forward": lambda: [cases.run_history(case, inputs, "triton", cache)]}

    def forward():
        with torch.no_grad():
            return list(cases.run_ours(case, inputs, "triton"))

    grad_outputs = [torch.randn_like(y) for y in forward()]

    def both():
        outputs = cases.run_ours(case, inputs, "triton")
        return [*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs)]

    return {"forward": forward, "forward+backward": both}


def tune_kernel(run: Callable, key: str, default: Config, best: dict[str, Config], limit: float) -> dict:
    """Time the candidates of one kernel that compile and give the default's results; the fastest is put into `best`."""
    expected = [x.clone() for x in run()]
    runs, refused, configs = {}, {}, {}
    for config in configurations(key, default):
        label = json.dumps(config, sort_keys=True)

        def timed(config=config):
            with tuning.override({**best, key: config}):
                return run()

        try:
            off = max(relative(a, b) for a, b in zip(timed(), expected, strict=True))
        except Exception as error:  # OutOfResources, or the compiler gives up
            refused[label] = describe(error)
            continue
        if off <= limit:
            runs[label], configs[label] = timed, config
        else:
            refused[label] = f"differs from the default by {off:.2e} of the 2-norm"
    if not runs:
        raise RuntimeError(f"no candidate could be used: {refused}")
    rounds, warmup = (2, 1) if TINY else (20, 3)
    timings = interleaved(runs, rounds, warmup, timer=make_timer(DEVICE), seconds=3.0)
    winner = min(timings, key=lambda label: timings[label].median)
    best[key] = configs[winner]
    milliseconds = {label: timing.median for label, timing in timings.items()}
    return {"default": default, "winner": configs[winner], "milliseconds": milliseconds, "refused": refused}


def keep(best: dict[str, Config]) -> None:
    """Not of a dry run: the CPU has no table."""
    if DEVICE.type == "cuda":
        write_json(tuning.cache_file(DEVICE), {"device": torch.cuda.get_device_name(DEVICE), "configs": best})


def main(folder: Path) -> int:
    if TINY:
        simulate()
    journal = Journal(folder / "tune.jsonl")
    done = journal.done()
    best = {entry["what"]: entry["winner"] for entry in journal.results() if "winner" in entry}
    torch.manual_seed(0)
    for case in tuned_cases():
        if reason := refusal(case.registered_op, "triton", DEVICE, case.dtype, case.width):
            print(f"not tuned: {case.label}: {reason}", flush=True)
            continue
        for way, run in runs_of(case).items():
            with tuning.override({}) as asked:
                run()
            for key, default in asked.items():
                if key not in done | best.keys():
                    with journal.piece(key, KERNEL_SECONDS) as entry:
                        entry["case"] = f"{case.label} {way}"
                        entry |= tune_kernel(run, key, default, best, 4 * torch.finfo(case.dtype).eps)
                    keep(best)
    return FAILED if journal.failures() else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
