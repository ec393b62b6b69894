"""Values and gradients on the device against fp64, and 1000 repeats that must agree to the last bit."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch

from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.segment_adaln import reference as adaln_reference
from benchmarks.gpu import cases
from benchmarks.gpu.cases import ADALN, MASKS, OPS, Case
from benchmarks.gpu.record import ROOT, Record

sys.path.append(str(ROOT / "tests"))  # the tolerance rule is said once, there
from oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_close

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


def check_attention(case: Case, backend: str, device: torch.device) -> dict:
    inputs, history = cases.make_inputs(case, device), case.op == "history_attention"
    grad_out = torch.randn(case.B, case.H, case.tokens, case.D, device=device).to(case.dtype)
    heads, chunk = pick_heads(case, device)
    if chunk < 1:
        return {"skipped": f"the fp64 reference of T={case.tokens} does not fit in this GPU's free memory"}
    with poisoned():
        out = cases.run_ours(case, inputs, backend)[0]
        got = [out] if history else [out, *cases.heads_first(case, torch.autograd.grad(out, inputs, grad_out))]
    assert all(torch.isfinite(x).all() for x in got), f"{case.label}: not finite"
    got, small, small_grad = (
        [x.detach().flatten(0, 1)[heads].unsqueeze(1) for x in tensors]
        for tensors in (got, cases.heads_first(case, inputs), [grad_out])
    )

    def reference(q, k, v):
        return attention_reference(q, k, v, list(case.lengths), *MASKS[case.mask])[0]

    exact = attention_with_gradients(case, reference, small, small_grad[0], torch.float64, chunk)
    plain = attention_with_gradients(
        case, lambda q, k, v: cases.plain_attention(case, q, k, v), small, small_grad[0], case.dtype, chunk
    )
    kept = len(got)
    return {"heads": len(heads), "ratios": compare(case, got, plain[:kept], exact[:kept], 1)}


def check_adaln(case: Case, backend: str, device: torch.device) -> dict:
    inputs = cases.make_inputs(case, device)
    lengths = [1] if case.per_token else list(case.lengths)
    reference = getattr(adaln_reference, case.op)

    def exact_outputs(*tensors):
        outputs = reference(*tensors, lengths)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    with poisoned():
        outputs = cases.run_ours(case, inputs, backend)
        grad_outputs = [torch.randn_like(y) for y in outputs]
        got = [*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs)]
    results = [got]
    for ys, tensors in ((cases.plain_adaln(case, *inputs), inputs), (exact_outputs(*wide), wide)):
        grads = torch.autograd.grad(ys, tensors, [g.to(y.dtype) for g, y in zip(grad_outputs, ys, strict=True)])
        results.append([y.detach() for y in ys] + list(grads))
    return {"ratios": compare(case, *results, len(outputs))}


def correctness(record: Record) -> str:
    """Every case on every backend that is a kernel of ours, most important first, until the time is over."""
    device = record.device
    work = [(c, b) for c in cases.correctness_cases(record.dry) for b in cases.backends_to_check(c.op, device)]
    torch.manual_seed(0)
    done = skipped = 0
    for case, backend in work:
        if record.over:
            break
        row = {"case": case.label, "backend": backend}
        try:
            row |= (check_adaln if case.op in ADALN else check_attention)(case, backend, device)
            skipped += "skipped" in row
        except torch.cuda.OutOfMemoryError:
            row["skipped"] = "out of GPU memory"
            skipped += 1
        except Exception as error:
            record.fail(f"{case.label} on {backend}: {type(error).__name__}: {error}")
            row["failed"] = str(error)[:500]
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises, and ends the stage, if the error has broken the CUDA context
        done += 1
        record.add(row)
    record.facts["cases"] = {"ran": done - skipped, "skipped": skipped, "of": len(work)}
    worst = {}
    for row in record.rows:
        for name, ratio in row.get("ratios", {}).items():
            kind = "forward" if name.startswith("out") else "backward"
            worst[kind] = max(worst.get(kind, 0.0), ratio)
    record.facts["worst_ratio"] = worst
    return f"{done - skipped} of {len(work)} cases ran, {skipped} skipped, worst error ratios {worst}"


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
    repeats, total = 3 if record.dry else 1000, 0
    for op in OPS:
        case = Case(op, 1, (8, 8), H=1, D=16, C=24) if record.dry else Case(op, 2, (256,) * 4)
        for backend in cases.backends_to_check(op, record.device):
            if record.over:
                continue

            def run(case=case, backend=backend):
                differing = repeat_op(case, backend, record.device, repeats)
                row = {"case": case.label, "backend": backend, "repeats": repeats, "differing": differing}
                record.add(row, f"{case.label} on {backend}: {differing} of {repeats} runs differ")
                if differing:
                    record.fail(f"{case.label} on {backend}: {differing} of {repeats} runs differ from the first")

            record.attempt(case.label, run)
            total += 1
    return f"{total} ops, {repeats} runs each"
