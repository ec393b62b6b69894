"""Errors of ours over those of plain PyTorch, within the tests' rule: 1.5 x forward, 2 x backward."""

import pytest
import torch

from benchmarks.numerics.errors import OPS, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors(room, op, dtype):
    found = errors(op, dtype)
    room.facts.setdefault("errors", []).extend(found)
    for entry in found:
        assert entry["ratio_to_plain"] <= (1.5 if entry["direction"] == "forward" else 2.0), entry
