"""What tests/test_model_sizes.py does with a case: compare with fp64, repeat, capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.common.backends import refusal
from testing import cases
from testing.cases import ATTENTION, MASKS, NORM_ROPE, Case
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_close
from testing.poison import poisoned

# fp64 (T, T) matrices alive at once in the reference and its gradient.
MATRICES = 7
# All heads are compared up to this many (query, key) pairs, beyond it evenly spaced ones.
PAIRS = 1 << 31


@dataclass(frozen=True)
class Expected:
    """Inputs of a case, and what plain PyTorch and fp64 make of them: outputs, then gradients."""

    inputs: list[torch.Tensor]
    grad_outputs: list[torch.Tensor]
    plain: list[torch.Tensor]
    exact: list[torch.Tensor]
    heads: torch.Tensor | None = None  # of attention, those that are compared


def skip_if_too_wide(case: Case, backend: str, device: torch.device) -> None:
    """Some chips have less shared memory than a width needs; whatever else a backend refuses is an error."""
    reason = refusal(case.registered_op, backend, device, case.dtype, case.width)
    if reason is not None and "shared memory" in reason:
        pytest.skip(reason)


def check_values(case: Case, backend: str, device: torch.device) -> dict[str, float]:
    """Outputs and gradients, memory poisoned, under the rule; returns the ratios err(ours) / err(plain)."""
    skip_if_too_wide(case, backend, device)
    expected = expect(case, device)
    with poisoned():
        outputs, got = run(case, backend, expected.inputs, expected.grad_outputs)
    assert all(torch.isfinite(x).all() for x in got), "not finite"
    if case.op in ATTENTION:
        got = chosen_heads([*got[:1], *cases.heads_first(case, got[1:])], expected.heads)
    ratios = {}
    for i, tensors in enumerate(zip(got, expected.plain[: len(got)], expected.exact[: len(got)], strict=True)):
        forward = i < outputs
        label = f"out{i}" if forward else f"grad{i - outputs}"
        factor = FORWARD_FACTOR if forward else BACKWARD_FACTOR
        ratios[label] = round(assert_close(*tensors, factor=factor, label=label), 4)
    return ratios


def run(case: Case, backend: str, inputs, grad_outputs, cache=None) -> tuple[int, list[torch.Tensor]]:
    """(how many outputs, outputs and gradients)."""
    if case.op == "history_attention":
        return 1, [cases.run_history(case, inputs, backend, cache)]
    outputs = cases.run_ours(case, inputs, backend)
    grads = torch.autograd.grad(outputs, inputs, grad_outputs)
    return len(outputs), [*(y.detach() for y in outputs), *grads]


@lru_cache(maxsize=1)  # the backends of a case follow one another
def expect(case: Case, device: torch.device) -> Expected:
    if case.op in ATTENTION:
        return expect_attention(case, device)
    if case.op == NORM_ROPE:
        return expect_whole(case, device, cases.plain_norm_rope, cases.exact_norm_rope)
    return expect_whole(case, device, cases.plain_adaln, cases.exact_adaln)


def expect_attention(case: Case, device: torch.device) -> Expected:
    inputs = cases.make_inputs(case, device)
    grad_out = torch.randn(case.B, case.H, case.tokens, case.D, device=device).to(case.dtype)
    heads, chunk = pick_heads(case, device)
    if chunk < 1:
        pytest.skip(f"the fp64 reference of T={case.tokens} does not fit in this GPU's free memory")
    small = chosen_heads(cases.heads_first(case, inputs), heads)
    small_grad = chosen_heads([grad_out], heads)[0]

    def reference(q, k, v):
        return attention_reference(q, k, v, list(case.lengths), *MASKS[case.mask], case.scale)[0]

    def in_plain_pytorch(q, k, v):
        return cases.plain_attention(case, q, k, v)

    results = [
        attention_with_gradients(function, small, small_grad, dtype, chunk)
        for function, dtype in ((in_plain_pytorch, case.dtype), (reference, torch.float64))
    ]
    return Expected(inputs, [grad_out], *results, heads)


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


def chosen_heads(tensors_BHTD, heads: torch.Tensor) -> list[torch.Tensor]:
    """The (batch, head) pairs `heads` of each, as (heads, 1, T, D)."""
    return [x.detach().flatten(0, 1)[heads].unsqueeze(1) for x in tensors_BHTD]


def attention_with_gradients(function, inputs, grad_out, dtype, chunk: int) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of `function` on (heads, 1, T, D) inputs, `chunk` heads at a time."""
    parts = []
    for start in range(0, len(inputs[0]), chunk):
        q, k, v = (x[start : start + chunk].to(dtype).detach().requires_grad_() for x in inputs)
        out = function(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), grad_out[start : start + chunk].to(dtype))
        parts.append([out.detach(), *grads])
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def expect_whole(case: Case, device: torch.device, plain: Callable, exact_of: Callable) -> Expected:
    """Of all inputs at once; plain and exact_of take (case, *inputs)."""
    inputs = cases.make_inputs(case, device)
    outputs = plain(case, *inputs)
    grad_outputs = [torch.randn_like(y) for y in outputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = exact_of(case, *wide)
    results = []
    for ys, tensors in ((outputs, inputs), (exact, wide)):
        grads = torch.autograd.grad(ys, tensors, [g.to(y.dtype) for g, y in zip(grad_outputs, ys, strict=True)])
        results.append([y.detach() for y in ys] + list(grads))
    return Expected(inputs, grad_outputs, *results)


def difference(got, first) -> torch.Tensor:
    """Device bool: some bit differs (NaN equals itself)."""
    bits = {2: torch.int16, 4: torch.int32}
    different = [
        (a.contiguous().view(bits[a.element_size()]) != b.contiguous().view(bits[b.element_size()])).any()
        for a, b in zip(got, first, strict=True)
    ]
    return torch.stack(different).any()


def differing_runs(case: Case, backend: str, device: torch.device, repeats: int) -> int:
    """How many of `repeats` runs, forward and backward, differ from the first in any bit; one sync at the end."""
    inputs = cases.make_inputs(case, device)
    grad_outputs = [torch.randn_like(y) for y in cases.run_ours(case, inputs, backend)]
    first = [x.clone() for x in run(case, backend, inputs, grad_outputs)[1]]
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(repeats):
        differing += difference(run(case, backend, inputs, grad_outputs)[1], first)
    return int(differing)


def graph_equals_eager(case: Case, backend: str, device: torch.device) -> bool:
    """Capture forward and backward after one warm-up call, replay on fresh inputs: bit-equal to eager."""
    inputs, fresh = (cases.make_inputs(case, device) for _ in range(2))
    grad_outputs = [torch.randn_like(y) for y in cases.run_ours(case, inputs, backend)]
    cache = cases.new_cache(case, device) if case.op == "history_attention" else None

    def refill():
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)

    got = replayed(lambda: run(case, backend, inputs, grad_outputs, cache)[1], refill, device)
    expected = run(case, backend, fresh, grad_outputs, cache)[1]
    return not bool(difference(got, expected))


def replayed(function, refill, device: torch.device) -> list[torch.Tensor]:
    """Outputs of a graph of `function` replayed after `refill` changed its inputs; on the CPU of a second call."""
    if device.type == "cpu":
        function()
        refill()
        return function()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    refill()
    graph.replay()
    torch.cuda.synchronize(device)
    return outputs
