"""Kernel benchmarks: our backends and the peers take turns, once they have given the same results.

Forward runs without gradients. "backward" is timed alone, on graphs prepared for every input set; "forward+backward"
builds the graph too. Rates count useful work only: FLOPs of pairs the mask keeps, bytes that any kernel must move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch._functorch import config as functorch_config

from ard_kernels import history_attention
from ard_kernels.common.backends import resolve
from benchmarks.block_causal_attention.peers import attention_peers
from benchmarks.history_attention.peers import history_peers, segments
from benchmarks.rows import describe, goal, row
from benchmarks.segment_adaln.peers import adaln_peers
from benchmarks.timing import Timing, interleaved, make_timer, rotating, sets_needed
from testing import cases
from testing.cases import ADALN, MASKS, Case

# Tensors (B, T, C) that the reference copies: the two of a single one partly stay in a 32 MB cache.
COPIED = 6


@dataclass(frozen=True)
class Job:
    """One comparison: a row for each of our backends. `target`: the least ratio of the fastest peer's time to ours.

    flops, nbytes: useful FLOPs, and bytes that any kernel must move; `bound` is the unit, TFLOP/s or GB/s, of the rate.
    """

    case: Case
    direction: str  # forward, backward, forward+backward
    target: float
    flops: float
    nbytes: float
    bound: str
    rate_target: float | None = None
    fraction_target: float | None = None

    @property
    def label(self) -> str:
        return f"{self.case.label} {self.direction}"

    def rate(self, milliseconds: float) -> float:
        return self.flops / milliseconds / 1e9 if self.bound == "TFLOP/s" else self.nbytes / milliseconds / 1e6


@dataclass
class Measurement:
    """What a comparison gave: result rows, times, and why a candidate has none.

    refused: it cannot run here, or is a peer with other results than the rest; wrong: it is ours and has those.
    """

    rows: list[dict]
    timings: dict[str, Timing]
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """How long and how carefully to measure."""

    seconds: float
    rounds: int
    warmup: int
    compiled: bool = True  # peers through Inductor; a dry run leaves it out


def our_backends(case: Case, device: torch.device) -> list[str]:
    """What the library runs on this device by itself."""
    return [resolve(case.registered_op, None, device, case.dtype, case.width)]


def peer_makers(case: Case, device: torch.device, compiled: bool = True) -> dict[str, Callable[[], Callable]]:
    """Makers of the peers by name; nothing is allocated or compiled yet."""
    if case.op == "history_attention":
        return history_peers(case, device)
    if case.op in ADALN:
        return adaln_peers(case.op, compiled)
    makers = attention_peers(case, device, compiled)
    if case.op == cases.PACKED:
        return {name: lambda make=make: on_packed(case, make()) for name, make in makers.items()}
    return makers


def on_packed(case: Case, attend: Callable) -> Callable:
    return lambda qkv: attend(*cases.heads_first(case, [qkv]))


def our_makers(case: Case, backends: list[str], device: torch.device) -> dict[str, Callable[[], Callable]]:
    if case.op == "history_attention":
        return {backend: lambda b=backend: history_steps(case, device, b) for backend in backends}
    return {backend: lambda b=backend: lambda *inputs: cases.run_ours(case, inputs, b) for backend in backends}


def history_steps(case: Case, device: torch.device, backend: str) -> Callable:
    cache = cases.new_cache(case, device)
    window, sink = MASKS[case.mask]

    def run(q, k, v):
        cache.reset()
        settings = {"layer": 0, "window": window, "sink": sink, "backend": backend}
        return tuple(history_attention(*own, cache, **settings) for _, own in segments(case, q, k, v))

    return run


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def prepare(job: Job, function: Callable, sets: list, grad_outputs) -> Callable[[], object]:
    """The call to time, on the next input set each time."""
    if job.direction == "forward":

        def forward(*inputs):
            with torch.no_grad():
                return as_tuple(function(*inputs))

        return rotating(forward, sets)
    if job.direction == "forward+backward":
        return rotating(lambda *inputs: torch.autograd.grad(as_tuple(function(*inputs)), inputs, grad_outputs), sets)
    functorch_config.donated_buffer = False  # a compiled graph is run backward many times
    graphs = [(as_tuple(function(*inputs)), inputs) for inputs in sets]
    return rotating(lambda ys, xs: torch.autograd.grad(ys, xs, grad_outputs, retain_graph=True), graphs)


def make_sets(job: Job, device: torch.device):
    """Input sets to rotate, and gradients of the outputs where there is a backward."""
    case = job.case
    inputs = cases.make_inputs(case, device)
    count = sets_needed(device, sum(x.nbytes for x in inputs))
    sets = [inputs] + [cases.make_inputs(case, device) for _ in range(count - 1)]
    if job.direction == "forward":
        return [[x.detach() for x in each] for each in sets], None
    # outputs are (B, T, C), of attention (B, H, T, D)
    shape = (case.B, case.tokens, case.C) if case.op in ADALN else (case.B, case.H, case.tokens, case.D)
    outputs = 2 if case.op == "gate_residual_adaln" else 1
    return sets, [torch.randn(shape, device=device).to(case.dtype) for _ in range(outputs)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """2-norm of the difference over that of `expected`; infinite where one has a NaN."""
    off = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return float("inf") if math.isnan(off) else off


def odd_ones_out(results: dict[str, list[torch.Tensor]], limit: float) -> dict[str, str]:
    """Which candidates give other results than the one that most others agree with, and by how much."""

    def off(name: str, other: str) -> float:
        return max(relative(a, b) for a, b in zip(results[name], results[other], strict=True))

    support = {name: sum(off(other, name) <= limit for other in results) for name in results}
    trusted = max(support, key=support.get)  # the first of equals
    differences = {name: off(name, trusted) for name in results}
    return {
        name: f"differs from {trusted} by {difference:.2e} of the 2-norm; expected at most {limit:.2e}"
        for name, difference in differences.items()
        if difference > limit
    }


def references(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ceilings among the candidates: on a shared CPU the memory rate moves by a factor of two within minutes."""
    if device.type == "cuda":
        return {}
    if case.op in ADALN:
        source, target = (torch.randn(COPIED, case.B, case.tokens, case.C).to(case.dtype) for _ in range(2))
        return {"copy": lambda: target.copy_(source)}
    a, b = (torch.randn(1024, 1024).to(case.dtype) for _ in range(2))
    return {"matmul": lambda: a @ b}


def reference_rate(case: Case, timings: dict[str, Timing]) -> float | None:
    """What the reference reached: GB/s read + written, or TFLOP/s."""
    if "copy" in timings:
        return 2 * COPIED * case.B * case.tokens * case.C * case.dtype.itemsize / timings["copy"].median / 1e6
    return 2 * 1024**3 / timings["matmul"].median / 1e9 if "matmul" in timings else None


def measure(
    job: Job,
    device: torch.device,
    backends: list[str],
    how: How,
    *,
    ceiling: float | None = None,
    skip: dict[str, str] | None = None,
    piece: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> Measurement:
    """Prepare and check every candidate, time them in turns, hold the targets.

    ceiling: measured rate of the job's kind; on the CPU the reference is timed among the candidates instead.
    skip: candidates not to run, with the reason. piece: entered around the preparation of each candidate.
    """
    case = job.case
    sets, grad_outputs = make_sets(job, device)
    peers = peer_makers(case, device, how.compiled)
    runs, results, refused = {}, {}, dict(skip or {})
    for place, (name, make) in enumerate((our_makers(case, backends, device) | peers).items()):
        if name in refused:
            continue
        try:
            with piece(name):
                run = prepare(job, make(), sets, grad_outputs)
                results[name] = [x.clone() for x in run()]
                for _ in range(len(sets) - 1 + place):  # in a round each candidate takes another input set
                    run()
                runs[name] = run
        except Exception as error:
            refused[name] = describe(error)
            results.pop(name, None)
    # fp32 sums in another order differ by more ulps than 16-bit outputs that were rounded once
    limit = (64 if case.dtype == torch.float32 else 4) * torch.finfo(case.dtype).eps
    different = odd_ones_out(results, limit) if results else {}
    results.clear()
    for name in different:
        del runs[name]
    wrong = {name: why for name, why in different.items() if name in backends}
    refused |= {name: why for name, why in different.items() if name in peers}
    ours = [name for name in backends if name in runs]
    if not ours:
        return Measurement([], {}, refused, wrong)
    timings = interleaved(
        runs | references(case, device), how.rounds, how.warmup, timer=make_timer(device), seconds=how.seconds
    )
    ceiling = ceiling or reference_rate(case, timings)
    alive = [name for name in peers if name in runs]
    why = refused | wrong
    rows = [row_of(job, backend, ours, alive, timings, why, ceiling, len(sets)) for backend in ours]
    return Measurement(rows, timings, refused, wrong)


def row_of(job: Job, backend: str, mine: list[str], peers: list[str], timings, refused, ceiling, sets: int) -> dict:
    """One of our backends against the fastest peer and against the other one of ours."""
    case, own = job.case, timings[backend].median
    rate = job.rate(own)
    fraction = rate / ceiling if ceiling else None
    others = {f"ratio_to_{other}": timings[other].median / own for other in mine if other != backend}
    targets = []
    if peers:
        best = min(timings[name].median for name in peers)
        targets.append(goal("times the fastest peer", best / own, job.target))
    if backend == "cuda" and "triton" in mine:
        targets.append(goal("times triton", others["ratio_to_triton"], 1.0))
    if job.rate_target:
        targets.append(goal(f"useful {job.bound}", rate, job.rate_target))
    if job.fraction_target and fraction:
        targets.append(goal("of copy bandwidth", fraction, job.fraction_target))
    return row(
        case.op, case.label, job.direction, timings, backend, peers, job.target, **others,
        dtype=cases.name(case.dtype), backend=backend, width=case.width, registered_op=case.registered_op,
        refused=refused, rate=rate, unit=job.bound, intensity=job.flops / job.nbytes, ceiling=ceiling,
        fraction_of_measured_ceiling=fraction, input_sets=sets, targets=targets,
    )  # fmt: skip
