"""`python -m benchmarks.gpu.tune FOLDER`: the tuner (ard_kernels/tune) over DiT-XL/2's shapes and others, in a budget.

Each kernel is a piece of FOLDER/tune.jsonl, behind which it goes on; winners go to `tuning.cache_file()`, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ard_kernels.common import tuning
from ard_kernels.common.backends import refusal
from ard_kernels.common.tuning import Config
from ard_kernels.tune.calls import calls_of
from ard_kernels.tune.candidates import candidates
from ard_kernels.tune.search import plan, tune_kernel
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.machine import simulate
from benchmarks.gpu.processes import FAILED
from benchmarks.timing import DEVICE, TINY
from testing import cases
from testing.cases import ADALN, NORM_ROPE, OPS, Case

KERNEL_SECONDS = 120.0  # for a kernel's candidates, each compiled and timed: then its process ends


def candidates_of(key: str) -> Iterable[Config]:
    """In a dry run one of small blocks: the interpreter has no warps."""
    return [dict.fromkeys(tuning.default(key, DEVICE), 16)] if TINY else candidates(key)


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


def run_of(case: Case) -> Callable[[], object]:
    """The op, with its backward where it has one."""
    inputs = cases.make_inputs(case, DEVICE)

    def run() -> None:
        outputs = cases.run_ours(case, inputs, "triton")
        if case.op != "history_attention":
            torch.autograd.grad(outputs, inputs, [torch.zeros_like(y) for y in outputs])

    return run


def main(folder: Path) -> int:
    if TINY:
        simulate()
    journal = Journal(folder / "tune.jsonl")
    done = journal.done()
    for case in tuned_cases():
        if reason := refusal(case.registered_op, "triton", DEVICE, case.dtype, case.width):
            print(f"not tuned: {case.label}: {reason}", flush=True)
            continue
        for key, call in plan(calls_of(run_of(case)))[0].items():
            if key not in done:
                done.add(key)
                with journal.piece(key, KERNEL_SECONDS) as entry:
                    seconds, rounds = KERNEL_SECONDS / 2, 2 if TINY else 20
                    tuned = tune_kernel(key, call, candidates_of(key), DEVICE, seconds, rounds)
                    entry |= {"case": call.label, **tuned._asdict()}
                    tuning.keep(DEVICE, key, tuned.winner, call.line)
    return FAILED if journal.failures() else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
