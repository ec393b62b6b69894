"""Kernel benchmarks on the device: ours and the peers take turns, each checked against ours before it is timed.

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
from benchmarks.gpu.graphs import relative
from benchmarks.gpu.record import Record, describe
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


def candidates_of(case: Case, device: torch.device) -> dict[str, Callable]:
    backend = cases.backends_to_check(case.op, device)[0]
    if case.op == "history_attention":
        return {"ours": history_steps(case, device, backend), **peers.history_peers(case, device)}
    found = peers.adaln_peers(case.op, device) if case.op in ADALN else peers.attention_peers(case, device)
    if case.op == cases.PACKED:
        found = {name: (lambda qkv, f=f: f(*cases.heads_first(case, [qkv]))) for name, f in found.items()}
    return {"ours": lambda *inputs: cases.run_ours(case, inputs, backend), **found}


def prepare(job: Job, function: Callable, sets: list, grad_outputs) -> Callable[[], object]:
    """The call to time: forward on the next input set, or the backward of a graph made for it here."""
    if job.direction == "forward":

        def forward(*inputs):
            with torch.no_grad():
                return as_tuple(function(*inputs))

        return rotating(forward, sets)
    graphs = [(as_tuple(function(*inputs)), inputs) for inputs in sets]
    return rotating(lambda ys, xs: torch.autograd.grad(ys, xs, grad_outputs, retain_graph=True), graphs)


def checked_runs(job: Job, candidates: dict[str, Callable], sets: list, grad_outputs) -> tuple[dict, dict, dict]:
    """Calls to time; why the other peers cannot run; and which peers give other results than ours.

    Each call leaves off at the first input set.
    """
    runs, refused, different = {}, {}, {}
    limit = 4 * torch.finfo(job.case.dtype).eps
    expected = None
    for name, function in candidates.items():
        try:
            run = prepare(job, function, sets, grad_outputs)
            got = [x.clone() for x in run()]
            expected = got if expected is None else expected
            off = max(relative(a, b) for a, b in zip(got, expected, strict=True))
            for _ in range(len(sets) - 1):
                run()
        except Exception as error:
            if name == "ours":
                raise
            refused[name] = describe(error)
            continue
        if off <= limit:
            runs[name] = run
        else:
            different[name] = f"differs from ours by {off:.2e} of the 2-norm; expected at most {limit:.2e}"
    return runs, refused, different


def bench(record: Record, job: Job, ceiling: float | None, seconds: float) -> dict:
    """Make one row: prepare and check every candidate, time them in turns, hold the targets against the result."""
    case, device = job.case, record.device
    inputs = cases.make_inputs(case, device)
    count = sets_needed(device, sum(x.nbytes for x in inputs))
    sets = [inputs] + [cases.make_inputs(case, device) for _ in range(count - 1)]
    if job.direction == "forward":
        sets = [[x.detach() for x in each] for each in sets]
    candidates = candidates_of(case, device)
    with torch.no_grad():
        grad_outputs = [torch.randn_like(y) for y in as_tuple(candidates["ours"](*inputs))]
    runs, refused, different = checked_runs(job, candidates, sets, grad_outputs)
    for name, reason in different.items():
        record.fail(f"{case.label} {job.direction}: {name} {reason}")
    timer = make_timer(device)
    repeats = (2, 1) if record.dry else (200, 5)
    timings = interleaved(runs, *repeats, timer=timer, seconds=seconds)
    rate = job.work / timings["ours"].median * 1e3 / job.scale
    fraction = rate / ceiling if ceiling else None
    names, targets = [name for name in runs if name != "ours"], []
    if names:
        best = min(timings[name].median for name in names)
        targets.append(goal("times the fastest peer", best / timings["ours"].median, job.target))
    if job.rate_target:
        targets.append(goal(f"useful {job.unit}", rate, job.rate_target))
    if job.fraction_target and fraction:
        targets.append(goal("of copy bandwidth", fraction, job.fraction_target))
    return row(
        case.op, case.label, job.direction, timings, "ours", names, job.target,
        dtype=cases.name(case.dtype), backend=cases.backends_to_check(case.op, device)[0], refused=refused | different,
        rate=rate, unit=job.unit, fraction_of_measured_ceiling=fraction, input_sets=len(sets), targets=targets,
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


def history_job(B, L=256, S=4, H=16, D=72) -> Job:
    case = Case("history_attention", B, (L,) * S, H=H, D=D)
    flops = 4 * B * H * D * useful_pairs([L], case.tokens, None, 0)
    return Job(case, "forward", 1.0, flops, "TFLOP/s")


def jobs(dry: bool) -> list[Job]:
    """The rows of design section 6, the model's own shapes first."""
    ways = ("forward", "backward")
    if dry:
        found = [attention_job(1, 16, 16, "M4", way, 1.3, S=2, H=1) for way in ways]
        found += [adaln_job(op, 1, 16, 24, torch.float32, way, S=2) for op in ADALN for way in ways]
        found += [attention_job(1, 16, 16, "M3", way, 1.3, S=2, H=1, op=cases.PACKED) for way in ways]
        return [*found, history_job(1, L=16, S=2, H=1, D=16)]
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
    """Every row of `jobs` until the time is over."""
    functorch_config.donated_buffer = False  # a compiled graph is run backward many times
    torch.manual_seed(0)
    ceilings, work = measured_ceilings(record), jobs(record.dry)
    for job in work:
        if record.over:
            break
        label = f"{job.case.label} {job.direction}"

        def run(job=job, label=label):
            result = bench(record, job, ceilings.get(job.unit), seconds=2.5)
            text = "ran" if record.dry else "; ".join(map(verdict, result["targets"]))
            record.add(result, f"{label}: {text}")
            for name, reason in result["refused"].items():
                print(f"    {name} not timed: {reason[:160]}", flush=True)

        record.attempt(label, run)
        torch.compiler.reset()
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    return f"{len(record.rows)} of {len(work)} rows"
