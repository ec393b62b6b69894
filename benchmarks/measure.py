"""Comparisons: our backends and the peers take turns, those that have given what fp64 gives.

Forward runs without gradients. "backward" is timed alone, on graphs prepared for every input set; "forward+backward"
builds the graph too. Rates count useful work only: FLOPs of pairs the mask keeps, bytes that any kernel must move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch._functorch import config as functorch_config

from ard_kernels.tune.search import describe
from ard_kernels.tune.timing import Timing, interleaved, make_timer
from benchmarks.exact import allowed
from benchmarks.ops import Job, jobs, our_backends
from benchmarks.results import Row, compared, goal
from benchmarks.timing import DEVICE, TINY, ceilings, fresh_wall_clock, rotating, sets_needed
from testing import cases
from testing.cases import ADALN, NORM_ROPE, Case

MEMORY_BOUND = (*ADALN, NORM_ROPE)

# Tensors (B, T, C) that the reference copies: the two of a single one partly stay in a 32 MB cache.
COPIED = 6
MATMUL = 32 if TINY else 1024  # size of the reference's matrices


@dataclass
class Measurement:
    """What a comparison gave: result rows, times, and why a candidate has none.

    refused: it cannot run here, or is a peer with other results than fp64; wrong: it is ours and has those.
    """

    rows: list[Row]
    timings: dict[str, Timing]
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates that are timed in turns. `measure` is called once, when the first of them is asked for."""

    label: str
    names: tuple[str, ...]
    measure: Callable[[], Measurement]


@dataclass(frozen=True)
class How:
    """How long and how carefully to measure."""

    seconds: float = 2.0  # after which only the least number of rounds is finished
    rounds: int = 200
    warmup: int = 3
    compiled: bool = True  # peers through Inductor; a dry run leaves it out
    least: int = 15


def kernel_groups(*ops: str) -> list[Group]:
    """A group for each comparison of one of `ops` on this machine."""
    how = How(2.0, 2, 1, compiled=False) if TINY else How()
    groups = []
    for job in jobs(DEVICE):
        if job.case.registered_op in ops:
            names = (*our_backends(job.case, DEVICE), *job.op.peers(job.case, DEVICE, how.compiled))
            groups.append(Group(job.label, names, partial(measure, job, DEVICE, how)))
    return groups


@cache
def gpu_ceilings(device: torch.device) -> dict[str, float]:
    """Rates by unit, measured once in a run; on the CPU every job times its own."""
    return ceilings(device, 20) if device.type == "cuda" else {}


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def prepare(direction: str, function: Callable, sets: list, grad_outputs) -> Callable[[], object]:
    """The call to time, on the next input set each time."""
    if direction == "forward":

        def forward(*inputs):
            with torch.no_grad():
                return as_tuple(function(*inputs))

        return rotating(forward, sets)
    if direction == "forward+backward":
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
    B, T, H, D = case.B, case.tokens, case.H, case.D
    shape = (B, T, case.C) if case.op in ADALN else (B, T, H, D) if case.op == NORM_ROPE else (B, H, T, D)
    return sets, [torch.randn(shape, device=device).to(case.dtype) for _ in range(job.op.outputs)]


def references(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ceilings among the candidates: on a shared CPU the memory rate moves by a factor of two within minutes."""
    if device.type == "cuda":
        return {}
    if case.op in MEMORY_BOUND:
        source, target = (torch.randn(COPIED, case.B, case.tokens, case.width).to(case.dtype) for _ in range(2))
        return {"copy": lambda: target.copy_(source)}
    a, b = (torch.randn(MATMUL, MATMUL).to(case.dtype) for _ in range(2))
    return {"matmul": lambda: a @ b}


def reference_rate(case: Case, timings: dict[str, Timing]) -> float | None:
    """What the reference reached: GB/s read + written, or TFLOP/s."""
    if "copy" in timings:
        return 2 * COPIED * case.B * case.tokens * case.width * case.dtype.itemsize / timings["copy"].median / 1e6
    return 2 * MATMUL**3 / timings["matmul"].median / 1e9 if "matmul" in timings else None


def measure(job: Job, device: torch.device, how: How) -> Measurement:
    """Prepare and check every candidate, time them in turns, hold the targets."""
    case, backends = job.case, our_backends(job.case, device)
    sets, grad_outputs = make_sets(job, device)
    peers = job.op.peers(case, device, how.compiled)
    ours = {backend: partial(job.op.ours, case, device, backend) for backend in backends}
    exact, limit = job.op.exact(case, sets[0], grad_outputs), allowed(case.dtype)
    runs, errors, refused, wrong = {}, {}, {}, {}
    for place, (name, make) in enumerate((ours | peers).items()):
        try:
            run = prepare(job.direction, make(), sets, grad_outputs)
            errors[name] = exact.error(run())
            if errors[name] > limit:
                why = f"differs from fp64 by {errors[name]:.2e} of the 2-norm; expected at most {limit:.2e}"
                (wrong if name in ours else refused)[name] = why
                continue
            for _ in range(len(sets) - 1 + place):  # in a round each candidate takes another input set
                run()
            runs[name] = run
        except Exception as error:
            refused[name] = describe(error)
            errors.pop(name, None)
    del exact
    mine = [name for name in backends if name in runs]
    if not mine:
        return Measurement([], {}, refused, wrong)
    runs |= references(case, device)
    timer = fresh_wall_clock if job.fresh_memory else make_timer(device)
    timings = interleaved(runs, how.rounds, how.warmup, timer=timer, seconds=how.seconds, least=how.least)
    ceiling = gpu_ceilings(device).get(job.op.unit) or reference_rate(case, timings)
    alive = [name for name in peers if name in runs]
    facts = {"refused": refused | wrong, "ceiling": ceiling, "input_sets": len(sets), "errors": errors}
    rows = [row_of(job, backend, mine, alive, timings, **facts) for backend in mine]
    return Measurement(rows, timings, refused, wrong)


def row_of(job: Job, backend: str, mine: list[str], peers: list[str], timings, *, ceiling, **facts) -> Row:
    """One of our backends against the fastest peer and against the other one of ours."""
    case, own, unit = job.case, timings[backend].median, job.op.unit
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
        targets.append(goal(f"useful {unit}", rate, job.rate_target))
    if job.fraction_target and fraction:
        targets.append(goal("of copy bandwidth", fraction, job.fraction_target))
    return compared(
        timings, backend, peers, job.target, op=case.op, shape=job.shape, direction=job.direction,
        dtype=cases.name(case.dtype), backend=backend, width=case.width, registered_op=case.registered_op,
        rate=rate, unit=unit, intensity=job.intensity, ceiling=ceiling, fraction_of_measured_ceiling=fraction,
        targets=targets, **facts, **others,
    )  # fmt: skip
