"""Errors of every op against its fp64 reference over those of plain PyTorch in the same dtype, at model sizes.

Published; and within the tests' rule: 1.5 x forward, 2 x backward.
"""

from __future__ import annotations

import pytest
import torch

from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.segment_adaln import reference as adaln_reference
from benchmarks.measure import as_tuple
from benchmarks.timing import DEVICE, TINY
from testing import cases
from testing.cases import ADALN, Case
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, error_norm

OPS = ("block_causal_attention", "adaln_modulate", "gate_residual_adaln")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(case: Case, *inputs):
    return cases.plain_adaln(case, *inputs) if case.op in ADALN else cases.plain_attention(case, *inputs)


def reference(case: Case, *inputs):
    if case.op in ADALN:
        return getattr(adaln_reference, case.op)(*inputs, list(case.lengths))
    return attention_reference(*inputs, list(case.lengths))[0]


def errors(op: str, dtype: torch.dtype) -> list[dict]:
    """An entry for each output, then for each gradient."""
    case = Case(op, 1, (16 if TINY else 128,) * 4, H=4, dtype=dtype, row_dtype=dtype, packed=False)
    inputs = cases.make_inputs(case, DEVICE)
    wide = [x.detach().double().requires_grad_() for x in inputs]  # or autograd would round the reference's gradients
    outputs, grads = [], []
    for function, given in ((cases.run_ours, (inputs, None)), (plain, inputs), (reference, wide)):
        leaves = wide if given is wide else inputs
        ys = as_tuple(function(case, *given))
        torch.manual_seed(1)
        weights = [torch.randn(y.shape, device=DEVICE).to(dtype).to(y.dtype) for y in ys]
        outputs.append(ys)
        grads.append(torch.autograd.grad(ys, leaves, weights))
    entries = []
    for direction, (got, other, exact) in (("forward", outputs), ("backward", grads)):
        for index, (ours, theirs, right) in enumerate(zip(got, other, exact, strict=True)):
            error, plain_error = (error_norm(x.detach(), right.detach()) for x in (ours, theirs))
            entries.append(
                {
                    "op": op,
                    "dtype": cases.name(dtype),
                    "direction": direction,
                    "tensor": index,
                    "relative_error": error / right.norm().item(),
                    "ratio_to_plain": error / plain_error if plain_error else float(error > 0),
                }
            )
    return entries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors(room, op, dtype):
    found = errors(op, dtype)
    room.facts.setdefault("errors", []).extend(found)
    for entry in found:
        limit = FORWARD_FACTOR if entry["direction"] == "forward" else BACKWARD_FACTOR
        assert entry["ratio_to_plain"] <= limit, entry
