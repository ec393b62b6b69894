"""What qk_norm_rope is measured against: PyTorch's RMSNorm and the usual rotation, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from testing import plain
from testing.cases import Case, rotary_tables


def chain(case: Case, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """q, k and their weights to q and k: what model code does, a step at a time."""
    tables = [table[None, :, None] for table in rotary_tables(case, device)]

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        normed = (plain.qk_norm(x, "rms", case.over, weight) for x, weight in ((q, q_weight), (k, k_weight)))
        return tuple(plain.rotate(x, *tables) for x in normed)

    return run


def norm_rope_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; not `compiled`: Inductor is left out, for a dry run."""
    how = {"dynamic": False} if compiled else {"backend": "aot_eager"}
    run = chain(case, device)
    return {"eager": lambda: run, "compile": lambda: torch.compile(run, **how)}
