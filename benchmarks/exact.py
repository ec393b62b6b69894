"""What a candidate should have given: outputs or gradients in fp64, of attention segment by segment in O(T) memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.spec import visibility
from ard_kernels.tune.search import relative
from testing import cases
from testing.cases import Case

# All heads are compared up to this many (query, key) pairs of attention; of more, evenly spaced ones, two at least.
PAIRS = {"cpu": 1 << 26, "cuda": 1 << 31}


class Exact(NamedTuple):
    """expected: tensors in fp64. part: of what a candidate returned, the tensors to compare with them."""

    expected: list[Tensor]
    part: Callable[[Sequence[Tensor]], list[Tensor]]

    def error(self, returned: Sequence[Tensor]) -> float:
        """The largest of the tensors' errors: 2-norm of the difference over that of the expected one."""
        return max(relative(got, right) for got, right in zip(self.part(returned), self.expected, strict=True))


def allowed(dtype: torch.dtype) -> float:
    """The error up to which a candidate is right: 16-bit outputs are rounded once, fp32 sums at every term."""
    return (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps


def exact_adaln(case: Case, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None) -> Exact:
    """Outputs, or with grad_outputs the inputs' gradients."""
    wide = [x.detach().double().requires_grad_(grad_outputs is not None) for x in inputs]
    ys = cases.exact_adaln(case, *wide)
    if grad_outputs is not None:
        ys = torch.autograd.grad(ys, wide, [g.double() for g in grad_outputs])
    return Exact(list(ys), list)


def exact_norm_rope(case: Case, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None) -> Exact:
    """q and k, or with grad_outputs the gradients of q, k and their weights."""
    wide = [x.detach().double().requires_grad_(grad_outputs is not None) for x in inputs]
    ys = list(cases.exact_norm_rope(case, *wide))
    if grad_outputs is not None:
        ys = list(torch.autograd.grad(ys, wide, [g.double() for g in grad_outputs]))
    return Exact(ys, list)


def exact_attention(case: Case, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None) -> Exact:
    """The output, or with grad_outputs the gradients of q, k, v; history attention's steps joined."""
    q, k, v = cases.heads_first(case, inputs)
    pairs = visibility(case.segments, case.tokens, case.tokens).pairs * (case.H // case.key_heads)
    count = case.B * case.key_heads
    chosen = min(count, max(2, PAIRS[q.device.type] // pairs))
    heads = torch.linspace(0, count - 1, chosen, device=q.device).round().long().unique()

    def of_heads(x: Tensor) -> Tensor:
        """(chosen key heads, query heads of each or 1, T, D)"""
        return x.detach().unflatten(1, (case.key_heads, -1)).flatten(0, 1)[heads]

    def part(returned: Sequence[Tensor]) -> list[Tensor]:
        if grad_outputs is None:
            return [of_heads(torch.cat(list(returned), 2))]
        return [of_heads(x) for x in cases.heads_first(case, returned)]

    grad_out = None if grad_outputs is None else of_heads(grad_outputs[0])
    return Exact(_attention(case, *(of_heads(x) for x in (q, k, v)), grad_out), part)


def _attention(case: Case, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None) -> list[Tensor]:
    """[out] or [dq, dk, dv] in fp64, a head and a segment at a time: scores of long ones are gigabytes."""
    seen = visibility(case.segments, case.tokens, case.tokens)
    scale = case.D**-0.5 if case.scale is None else case.scale
    results = [torch.zeros_like(x, dtype=torch.float64) for x in ((q,) if grad_out is None else (q, k, v))]
    for index in range(len(q)):
        for head in range(q.shape[1]):
            for (start, stop), ranges in zip(pairwise(seen.q_offsets), seen.keys, strict=True):
                rows = index, head, slice(start, stop)
                keys = [(index, 0, slice(*run)) for run in ranges]
                leaves = [q[rows].double(), *(torch.cat([x[run] for run in keys]).double() for x in (k, v))]
                leaves = [x.requires_grad_(grad_out is not None) for x in leaves]
                out = (leaves[0] @ leaves[1].T * scale).softmax(-1) @ leaves[2]
                if grad_out is None:
                    results[0][rows] = out
                    continue
                dq, *of_keys = torch.autograd.grad(out, leaves, grad_out[rows].double())
                results[0][rows] = dq
                for whole, share in zip(results[1:], of_keys, strict=True):
                    for run, piece in zip(keys, share.split([b - a for a, b in ranges]), strict=True):
                        whole[run] += piece
    return results
