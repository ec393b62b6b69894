"""How the peak memory of attention grows with tokens T: as T, where a T x T mask grows as its square.

Teacher forcing, forward and backward, ever more segments of one length; beside it SDPA under the dense mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.block_causal_attention.peers import dense
from benchmarks.memory import peak_bytes
from benchmarks.ops import run_op
from benchmarks.timing import DEVICE, TINY
from testing import cases
from testing.cases import SEGMENT, Case

LENGTH = 256
TOKENS = (2048, 4096, 8192)
HEADS = {"H": 4, "D": 64}
# From the fewest tokens to the most, four times as many: as T it is 4, as T^2 16.
MOST_GROWTH = 5.0


def training_step(case: Case, attend: Callable, device: torch.device) -> Callable[[], object]:
    inputs = cases.make_inputs(case, device)
    grad_out = torch.randn(case.B, case.H, case.tokens, case.D, device=device).to(case.dtype)

    def run():
        out = attend(*inputs)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, inputs, grad_out)

    return run


def peaks(tokens: Sequence[int], device: torch.device, **heads: int) -> list[dict]:
    """An entry per number of tokens: peak_bytes of ours and of the dense mask (made within the call, as users do)."""
    entries = []
    for count in tokens:
        case = Case(SEGMENT, 1, (LENGTH,) * (count // LENGTH), mask="teacher-forcing", dtype=torch.float32, **heads)
        candidates = {
            "ours": run_op(case, device, None),
            "dense": lambda *inputs, case=case: dense(case, device, additive=False)(*inputs),
        }
        runs = {name: training_step(case, attend, device) for name, attend in candidates.items()}
        runs["ours"]()  # what PyTorch allocates once
        held = {name: peak_bytes(run, device) for name, run in runs.items()}
        entries.append({"tokens": count, "shape": case.label, "peak_bytes": held})
    return entries


@pytest.mark.skipif(TINY, reason="a dry run has too few tokens to tell")
def test_peak_memory_grows_as_the_tokens(room):
    room.facts["peaks"] = found = peaks(TOKENS, DEVICE, **HEADS)
    first, last = found[0]["peak_bytes"], found[-1]["peak_bytes"]
    if first["ours"] is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert last["ours"] <= MOST_GROWTH * first["ours"], found
    assert last["dense"] > 1.5 * MOST_GROWTH * first["dense"], "what would grow as T^2 is seen"
