"""Kernel benchmarks on the device: our backends and the peers take turns, once they have given the same results.

Forward runs without gradients. Backward is timed alone, on graphs prepared for every input set. Rates count useful work
only: FLOPs of pairs the mask keeps, bytes that any kernel must move.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._functorch import config as functorch_config

from ard_kernels import history_attention
from ard_kernels.block_causal_attention.spec import useful_pairs
from benchmarks.gpu import cases, peers
from benchmarks.gpu.cases import ADALN, MASKS, Case
from benchmarks.gpu.fastest import compare_backends, faster_words
from benchmarks.gpu.graphs import relative
from benchmarks.gpu.record import LIMIT, Record, describe
from benchmarks.gpu.timing import make_timer, rotating, sets_needed
from benchmarks.harness import interleaved, row

# (B, T, C) tensors any kernel must read or write: forward, backward.
ADALN_TENSORS = {"adaln_modulate": (2, 3), "gate_residual_adaln": (4, 6), "gate_residual": (3, 3)}


@dataclass(frozen=True)
class Job:
    """One row to make. `work` is in FLOPs or bytes, `ceiling` the measured rate of the same kind, units per second."""

    case: Case
    direction: str
    target: float
    work: float
    unit: str  # TFLOP/s or GB/s
    rate_target: float | None = None
    fraction_target: float | None = None

    @property
    def label(self) -> str:
        return f"{self.case.label} {self.direction}"

    @property
    def scale(self) -> float:
        return {"TFLOP/s": 1e12, "GB/s": 1e9}[self.unit]


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def history_steps(case: Case, device: torch.device, backend: str) -> Callable:
    cache = cases.new_cache(case, device)
    L, (window, sink) = case.lengths[0], MASKS[case.mask]

    def run(q, k, v):
        cache.reset()
        segments = [[x[:, :, start : start + L] for x in (q, k, v)] for start in range(0, case.tokens, L)]
        settings = {"layer": 0, "window": window, "sink": sink, "backend": backend}
        return tuple(history_attention(*own, cache, **settings) for own in segments)

    return run


def candidates_of(case: Case, backends: list[str], device: torch.device) -> dict[str, Callable]:
    """Our backends by their names, then the peers."""
    if case.op == "history_attention":
        ours = {backend: history_steps(case, device, backend) for backend in backends}
        return ours | peers.history_peers(case, device)
    found = peers.adaln_peers(case.op, device) if case.op in ADALN else peers.attention_peers(case, device)
    if case.op == cases.PACKED:
        found = {name: (lambda qkv, f=f: f(*cases.heads_first(case, [qkv]))) for name, f in found.items()}
    return {b: (lambda *inputs, b=b: cases.run_ours(case, inputs, b)) for b in backends} | found


def prepare(job: Job, function: Callable, sets: list, grad_outputs) -> Callable[[], object]:
    """The call to time: forward on the next input set, or the backward of a graph made for it here."""
    if job.direction == "forward":

        def forward(*inputs):
            with torch.no_grad():
                return as_tuple(function(*inputs))

        return rotating(forward, sets)
    graphs = [(as_tuple(function(*inputs)), inputs) for inputs in sets]
    return rotating(lambda ys, xs: torch.autograd.grad(ys, xs, grad_outputs, retain_graph=True), graphs)


def prepared_runs(record: Record, job: Job, candidates: dict[str, Callable], sets: list, grad_outputs):
    """Calls to time, what each gives for the first input set, and why the other candidates cannot run."""
    runs, results, refused = {}, {}, {}
    for name, function in candidates.items():
        label = f"{job.label} on {name}"
        if label in record.crashed:
            refused[name] = "it ended the process"
            continue
        try:
            with record.piece(label, LIMIT if name in cases.BACKENDS else None):
                run = prepare(job, function, sets, grad_outputs)
                results[name] = [x.clone() for x in run()]
                for _ in range(len(sets) - 1):  # each call leaves off at the first input set
                    run()
                runs[name] = run
        except Exception as error:
            refused[name] = describe(error)
            results.pop(name, None)
    return runs, results, refused


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


def bench(record: Record, job: Job, ceiling: float | None, seconds: float) -> list[dict]:
    """A row for each of our backends: prepare and check every candidate, time them in turns, hold the targets."""
    case, device = job.case, record.device
    inputs = cases.make_inputs(case, device)
    count = sets_needed(device, sum(x.nbytes for x in inputs))
    sets = [inputs] + [cases.make_inputs(case, device) for _ in range(count - 1)]
    grad_outputs = None
    if job.direction == "forward":
        sets = [[x.detach() for x in each] for each in sets]
    else:  # outputs are (B, T, C), of attention (B, H, T, D)
        shape = (case.B, case.tokens, case.C) if case.op in ADALN else (case.B, case.H, case.tokens, case.D)
        outputs = 2 if case.op == "gate_residual_adaln" else 1
        grad_outputs = [torch.randn(shape, device=device).to(case.dtype) for _ in range(outputs)]
    ours = cases.serving(record, case)
    candidates = candidates_of(case, ours, device)
    runs, results, refused = prepared_runs(record, job, candidates, sets, grad_outputs)
    different = odd_ones_out(results, 4 * torch.finfo(case.dtype).eps)
    results.clear()
    for name in ours:
        if name in refused and f"{job.label} on {name}" not in record.crashed:
            record.fail(f"{job.label} on {name}: {refused[name]}")
    for name, reason in different.items():
        record.fail(f"{job.label} on {name}: {reason}")
        del runs[name]
    for name, reason in (refused | different).items():
        print(f"    {name} not timed: {reason[:160]}", flush=True)
    mine = [name for name in ours if name in runs]
    if not mine:
        raise RuntimeError(f"no backend of ours can be timed: {refused | different}")
    repeats = (2, 1) if record.dry else (200, 5)
    timings = interleaved(runs, *repeats, timer=make_timer(device), seconds=seconds)
    names = [name for name in runs if name not in ours]
    return [row_of(job, backend, mine, names, timings, refused | different, ceiling, len(sets)) for backend in mine]


def row_of(job: Job, backend: str, mine: list[str], peers: list[str], timings, refused, ceiling, sets: int) -> dict:
    """One of our backends against the fastest peer and against the other one of ours."""
    case, own = job.case, timings[backend].median
    rate = job.work / own * 1e3 / job.scale
    fraction = rate / ceiling if ceiling else None
    others = {f"ratio_to_{other}": timings[other].median / own for other in mine if other != backend}
    targets = []
    if peers:
        best = min(timings[name].median for name in peers)
        targets.append(goal("times the fastest peer", best / own, job.target))
    if backend == "cuda" and "triton" in mine:
        targets.append(goal("times triton", others["ratio_to_triton"], 1.0))
    if job.rate_target:
        targets.append(goal(f"useful {job.unit}", rate, job.rate_target))
    if job.fraction_target and fraction:
        targets.append(goal("of copy bandwidth", fraction, job.fraction_target))
    return row(
        case.op, case.label, job.direction, timings, backend, peers, job.target, **others,
        dtype=cases.name(case.dtype), backend=backend, width=case.width, registered_op=case.registered_op,
        refused=refused, rate=rate, unit=job.unit, fraction_of_measured_ceiling=fraction, input_sets=sets,
        targets=targets,
    )  # fmt: skip


def goal(what: str, value: float, target: float) -> dict:
    return {"what": what, "value": value, "target": target, "met": value >= target}


def verdict(target: dict) -> str:
    """met, or missed with how far: value / target."""
    met = "met" if target["met"] else f"missed: {target['value'] / target['target']:.3f} of it"
    return f"{target['value']:.3f} {target['what']} (target {target['target']:.3f}): {met}"


def attention_job(B, L, D, mask, direction, target, rate_target=None, S=4, H=16, op=cases.ATTENTION[0]) -> Job:
    case = Case(op, B, (L,) * S, H=H, D=D, mask=mask)
    pairs = useful_pairs([L], case.tokens, *MASKS[mask])
    matmuls = 2 if direction == "forward" else 5
    return Job(case, direction, target, matmuls * 2 * B * H * D * pairs, "TFLOP/s", rate_target)


def adaln_job(op, B, L, C, row_dtype, direction, S=4) -> Job:
    case = Case(op, B, (L,) * S, C=C, row_dtype=row_dtype)
    forward = direction == "forward"
    moved = ADALN_TENSORS[op][0 if forward else 1] * B * case.tokens * C * case.dtype.itemsize
    return Job(case, direction, 1.2 if forward else 1.5, moved, "GB/s", fraction_target=0.90 if forward else 0.75)


def history_job(B, D=72, L=256, S=4, H=16) -> Job:
    case = Case("history_attention", B, (L,) * S, H=H, D=D)
    flops = 4 * B * H * D * useful_pairs([L], case.tokens, None, 0)
    return Job(case, "forward", 1.0, flops, "TFLOP/s")


def jobs(dry: bool) -> list[Job]:
    """The rows of design section 6, the model's own shapes first."""
    ways = ("forward", "backward")
    if dry:
        found = [attention_job(1, 16, 64, "M4", way, 1.3, S=2, H=1) for way in ways]
        found += [adaln_job(op, 1, 16, 24, torch.float32, way, S=2) for op in ADALN[:2] for way in ways]
        found += [attention_job(1, 16, 64, "M3", "backward", 1.3, S=2, H=1, op=cases.PACKED)]
        return [*found, history_job(1, 64, L=16, S=2, H=1)]
    found = [attention_job(32, 256, 72, "M4", way, 1.3, rate) for way, rate in zip(ways, (450.0, 330.0), strict=True)]
    found += [adaln_job(op, 32, 256, 1152, torch.float32, way) for op in ADALN[:2] for way in ways]
    found += [attention_job(32, 256, 72, "M4", way, 1.3, op=cases.PACKED) for way in ways]
    found += [history_job(B) for B in (1, 32)]
    found += [adaln_job(op, 32, 256, 1152, torch.bfloat16, way) for op in ADALN[:2] for way in ways]
    found += [attention_job(8, 1024, 72, "M4", way, 1.1) for way in ways]
    found += [attention_job(32, 256, D, "M4", way, 1.0) for D in (64, 128) for way in ways]
    found += [attention_job(2, 4096, 72, "M4", way, 1.1) for way in ways]
    found += [attention_job(32, 256, 72, "M1", way, 1.0) for way in ways]
    found += [attention_job(1, 256, 72, "M4", way, 1.0) for way in ways]
    found += [
        attention_job(B, L, D, "M4", way, 1.0) for B, L in ((8, 1024), (2, 4096)) for D in (64, 128) for way in ways
    ]
    found += [
        adaln_job("gate_residual", 32, 256, 1152, dtype, way)
        for dtype in (torch.float32, torch.bfloat16)
        for way in ways
    ]
    # Shape classes of their own, for the automatic choice.
    found += [history_job(B, D) for D in (64, 128) for B in (1, 32)]
    found += [attention_job(32, 256, 96, "M4", way, 1.0) for way in ways]
    found += [history_job(B, 96) for B in (1, 32)]
    found += [adaln_job(op, 32, 256, C, torch.float32, way) for C in (384, 4096) for op in ADALN for way in ways]
    return found


def measured_ceilings(record: Record) -> dict[str, float]:
    """Rates by unit, from the environment stage of this run; empty when it left none."""
    path = record.folder / "environment.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if not rows:
        return {}
    found = rows[0]["ceilings"]
    return {"TFLOP/s": found["matmul_bf16_TFLOP_per_s"], "GB/s": found["copy_GB_per_s"]}


def kernels(record: Record) -> str:
    """The rows of every job until the time is over; then which of our backends is the fastest, by shape class."""
    functorch_config.donated_buffer = False  # a compiled graph is run backward many times
    ceilings, work = measured_ceilings(record), jobs(record.dry)
    for job in work:
        if record.over:
            break

        def run(job=job):
            torch.manual_seed(0)
            for result in bench(record, job, ceilings.get(job.unit), seconds=3.0):
                text = "ran" if record.dry else "; ".join(map(verdict, result["targets"]))
                record.add(result, f"{job.label} on {result['backend']}: {text}")

        record.attempt(job.label, run)
        torch.compiler.reset()
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    record.facts["shape_classes"] = compare_backends(record.rows)
    if not record.dry:
        print("  forward + backward (history: forward) of our backends, geometric mean over the shapes of a class")
        for shapes, result in record.facts["shape_classes"].items():
            print(f"  {shapes}: {faster_words(result)}")
    return f"{len(record.rows)} rows of {len(work)} jobs"
