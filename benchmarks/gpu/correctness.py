"""Values and gradients on the device against fp64, and 1000 repeats that must agree to the last bit."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.history_attention.norm import normalise
from ard_kernels.segment_adaln import reference as adaln_reference
from benchmarks.gpu import checklist
from benchmarks.gpu.record import Record
from testing import cases
from testing.cases import ADALN, MASKS, OPS, Case
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_close

# fp64 (T, T) matrices alive at once in the reference and its gradient.
MATRICES = 7
# All heads are compared up to this many (query, key) pairs, beyond it evenly spaced ones.
PAIRS = 1 << 31


@contextmanager
def poisoned():
    """Fresh memory from torch.empty is full of NaN: an output or workspace that is not wholly written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pick_heads(case: Case, device: torch.device) -> tuple[torch.Tensor, int]:
    """Indices of the (batch, head) pairs to compare, first and last among them, and how many fit in memory at once."""
    count, pairs = case.B * case.H, case.tokens**2
    chosen = min(count, max(2, PAIRS // pairs))
    free = 1 << 30
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier cases used and the allocator keeps
        free = torch.cuda.mem_get_info(device)[0]
    chunk = int(free * 0.8) // (8 * MATRICES * pairs)
    return torch.linspace(0, count - 1, chosen).round().long().unique().to(device), chunk


def attention_with_gradients(case: Case, function, inputs, grad_out, dtype, chunk: int) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of `function` on (heads, 1, T, D) inputs, `chunk` heads at a time."""
    parts = []
    for start in range(0, len(inputs[0]), chunk):
        q, k, v = (x[start : start + chunk].to(dtype).detach().requires_grad_() for x in inputs)
        out = function(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), grad_out[start : start + chunk].to(dtype))
        parts.append([out.detach(), *grads])
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def compare(case: Case, got, plain, exact, forward: int) -> dict[str, float]:
    """Ratios err(got) / err(plain) under the rule; the first `forward` tensors are outputs, the rest gradients."""
    ratios = {}
    for i, tensors in enumerate(zip(got, plain, exact, strict=True)):
        label, factor = (f"out{i}", FORWARD_FACTOR) if i < forward else (f"grad{i - forward}", BACKWARD_FACTOR)
        ratios[label] = round(assert_close(*tensors, factor=factor, label=f"{case.label}: {label}"), 4)
    return ratios


class Skipped(Exception):
    """A case that this GPU has no memory for."""


@dataclass(frozen=True)
class Expected:
    """Inputs of a case, and what plain PyTorch and fp64 make of them: outputs, then gradients."""

    inputs: list[torch.Tensor]
    grad_outputs: list[torch.Tensor]
    plain: list[torch.Tensor]
    exact: list[torch.Tensor]
    heads: torch.Tensor | None = None  # of attention, those that are compared


def expect_attention(case: Case, device: torch.device) -> Expected:
    inputs = cases.make_inputs(case, device)
    grad_out = torch.randn(case.B, case.H, case.tokens, case.D, device=device).to(case.dtype)
    heads, chunk = pick_heads(case, device)
    if chunk < 1:
        raise Skipped(f"the fp64 reference of T={case.tokens} does not fit in this GPU's free memory")
    small = chosen_heads(cases.heads_first(case, inputs), heads)
    small_grad = chosen_heads([grad_out], heads)[0]

    def reference(q, k, v):
        q, k = (normalise(x, cases.head_norm(case, device)) for x in (q, k))
        return attention_reference(q, k, v, list(case.lengths), *MASKS[case.mask], case.scale)[0]

    def plain(q, k, v):
        return cases.plain_attention(case, q, k, v)

    results = [
        attention_with_gradients(case, function, small, small_grad, dtype, chunk)
        for function, dtype in ((plain, case.dtype), (reference, torch.float64))
    ]
    return Expected(inputs, [grad_out], *results, heads)


def chosen_heads(tensors_BHTD, heads: torch.Tensor) -> list[torch.Tensor]:
    """The (batch, head) pairs `heads` of each, as (heads, 1, T, D)."""
    return [x.detach().flatten(0, 1)[heads].unsqueeze(1) for x in tensors_BHTD]


def expect_adaln(case: Case, device: torch.device) -> Expected:
    inputs = cases.make_inputs(case, device)
    lengths = [1] if case.per_token else list(case.lengths)
    outputs = cases.plain_adaln(case, *inputs)
    grad_outputs = [torch.randn_like(y) for y in outputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = getattr(adaln_reference, case.op)(*wide, lengths)
    exact = exact if isinstance(exact, tuple) else (exact,)
    results = []
    for ys, tensors in ((outputs, inputs), (exact, wide)):
        grads = torch.autograd.grad(ys, tensors, [g.to(y.dtype) for g, y in zip(grad_outputs, ys, strict=True)])
        results.append([y.detach() for y in ys] + list(grads))
    return Expected(inputs, grad_outputs, *results)


def expect(case: Case, device: torch.device) -> Expected:
    torch.manual_seed(0)
    return (expect_adaln if case.op in ADALN else expect_attention)(case, device)


def check(case: Case, backend: str, expected: Expected) -> dict:
    """Run one backend, memory poisoned, and compare."""
    with poisoned():
        outputs = cases.run_ours(case, expected.inputs, backend)
        got = [y.detach() for y in outputs]
        if case.op != "history_attention":
            grads = torch.autograd.grad(outputs, expected.inputs, expected.grad_outputs)
            got += cases.heads_first(case, grads)
    assert all(torch.isfinite(x).all() for x in got), f"{case.label}: not finite"
    compared = {}
    if expected.heads is not None:
        got, compared = chosen_heads(got, expected.heads), {"heads": len(expected.heads)}
    ratios = compare(case, got, expected.plain[: len(got)], expected.exact[: len(got)], len(outputs))
    return compared | {"ratios": ratios}


def check_case(record: Record, case: Case, backends: list[str]) -> None:
    """One case on each backend; inputs and references are made once."""
    expected = cache(lambda: expect(case, record.device))
    for backend in backends:
        label, row = f"{case.label} on {backend}", cases.facts(case, backend)

        def run(backend=backend, row=row):
            try:
                row |= check(case, backend, expected())
            except (Skipped, torch.cuda.OutOfMemoryError) as error:
                row["skipped"] = str(error) if isinstance(error, Skipped) else "out of GPU memory"
            except Exception as error:
                record.add(row | {"failed": str(error)[:500]})
                raise
            record.add(row)

        if label in record.crashed and not any(row.items() <= old.items() for old in record.rows):
            record.add(row | {"failed": "it ended the process"})
        record.attempt(label, run)


def correctness(record: Record) -> str:
    """Every case on every backend of ours that serves it, most important first, until the time is over."""
    work = [(case, checklist.serving(record, case)) for case in checklist.correctness_cases(record.dry)]
    for case, backends in work:
        if record.over:
            break
        check_case(record, case, backends)
    ran = [row for row in record.rows if "skipped" not in row]
    total, skipped = sum(len(backends) for _, backends in work), len(record.rows) - len(ran)
    record.facts["cases"] = {"ran": len(ran), "skipped": skipped, "of": total}
    record.facts["worst_ratio"] = worst = {}
    for backend in cases.BACKENDS:
        ratios = {"forward": 0.0, "backward": 0.0}
        for row in ran:
            for label, ratio in row.get("ratios", {}).items() if row["backend"] == backend else ():
                kind = "forward" if label.startswith("out") else "backward"
                ratios[kind] = max(ratios[kind], ratio)
        if any(ratios.values()):
            worst[backend] = ratios
    return f"{len(ran)} of {total} cases ran, {skipped} skipped, worst error ratios {worst}"


def difference(got, first) -> torch.Tensor:
    """Device bool: some bit differs (NaN equals itself)."""
    bits = {2: torch.int16, 4: torch.int32}
    different = [
        (a.view(bits[a.element_size()]) != b.view(bits[b.element_size()])).any()
        for a, b in zip(got, first, strict=True)
    ]
    return torch.stack(different).any()


def repeat_op(case: Case, backend: str, device: torch.device, repeats: int) -> int:
    """How many of `repeats` runs, forward and backward, differ from the first in any bit; one sync at the end."""
    inputs, grad_outputs = cases.make_inputs(case, device), None
    first, differing = None, torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(repeats):
        outputs = cases.run_ours(case, inputs, backend)
        if grad_outputs is None:
            grad_outputs = [torch.randn_like(y) for y in outputs]
        got = [y.detach() for y in outputs]
        if case.op != "history_attention":
            got += torch.autograd.grad(outputs, inputs, grad_outputs)
        first = first or [x.clone() for x in got]
        differing += difference([x.contiguous() for x in got], [x.contiguous() for x in first])
    return int(differing)


def determinism(record: Record) -> str:
    """Forward and backward of every op at the DiT-XL/2 layer, 1000 times: bit-equal."""
    repeats = 3 if record.dry else 1000
    for op in OPS:
        case = cases.tiny_case(op) if record.dry else Case(op, 2, (256,) * 4)
        for backend in checklist.serving(record, case):
            label = f"{case.label} on {backend}"

            def run(case=case, backend=backend, label=label):
                differing = repeat_op(case, backend, record.device, repeats)
                row = cases.facts(case, backend) | {"repeats": repeats, "differing": differing}
                record.add(row, f"{label}: {differing} of {repeats} runs differ")
                if differing:
                    record.fail(f"{label}: {differing} of {repeats} runs differ from the first")

            if not record.over:
                record.attempt(label, run)
    return f"{len(record.rows)} ops on backends, {repeats} runs each"
