"""What history attention is measured against: SDPA over keys and values kept the two usual ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.block_causal_attention.peers import Attend, sdpa_by_name
from testing.cases import Case


def segments(case: Case, q, k, v) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(where it ends, its q, k, v) of each segment."""
    L = case.lengths[0]
    for start in range(0, case.tokens, L):
        yield start + L, [x[:, :, start : start + L] for x in (q, k, v)]


def concatenated(case: Case, attend: Attend) -> Callable:
    """K and V grow by `cat`, as the published design does it."""

    def run(q, k, v):
        outputs, keys, values = [], q[:, :, :0], q[:, :, :0]
        for _, (own_q, own_k, own_v) in segments(case, q, k, v):
            keys, values = torch.cat([keys, own_k], 2), torch.cat([values, own_v], 2)
            outputs.append(attend(own_q, keys, values))
        return tuple(outputs)

    return run


def preallocated(case: Case, device: torch.device, attend: Attend) -> Callable:
    """K and V are copied into memory for all steps."""
    memory = [torch.empty(case.B, case.H, case.tokens, case.D, dtype=case.dtype, device=device) for _ in range(2)]

    def run(q, k, v):
        outputs = []
        for stop, (own_q, own_k, own_v) in segments(case, q, k, v):
            for held, own in zip(memory, (own_k, own_v), strict=True):
                held[:, :, stop - own.shape[2] : stop].copy_(own)
            outputs.append(attend(own_q, memory[0][:, :, :stop], memory[1][:, :, :stop]))
        return tuple(outputs)

    return run


def history_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; Inductor has nothing to gain in them, whether `compiled` or not."""
    peers = {}
    for name, attend in sdpa_by_name(device).items():
        peers[f"cat_{name}"] = partial(concatenated, case, attend)
        peers[f"preallocated_{name}"] = partial(preallocated, case, device, attend)
    return peers
