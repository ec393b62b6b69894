"""What qk_norm_rope is measured against: PyTorch's RMSNorm and the ways in which model code rotates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from testing import plain
from testing.cases import Case, rotary_tables

Rotate = Callable[[Tensor], Tensor]


def chain(case: Case, rotate: Rotate) -> Callable[..., tuple[Tensor, ...]]:
    """q, k and their weights to q and k: what model code does, a step at a time."""

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        pairs = (q, q_weight), (k, k_weight)
        return tuple(rotate(plain.qk_norm(x, "rms", case.over, weight)) for x, weight in pairs)

    return run


def rotations(case: Case, device: torch.device) -> dict[str, Rotate]:
    """By name: cos and sin of every element, complex numbers, the four products of each pair."""
    cos, sin = (table[None, :, None] for table in rotary_tables(case, device))
    factors = torch.complex(cos, sin)

    def by_complex(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # there are none in 16 bits
        return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)

    def by_pairs(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    return {"": lambda x: plain.rotate(x, cos, sin), "_complex": by_complex, "_pairs": by_pairs}


def norm_rope_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; not `compiled`: Inductor is left out, for a dry run."""
    how = {"dynamic": False} if compiled else {"backend": "aot_eager"}
    runs = {name: chain(case, rotate) for name, rotate in rotations(case, device).items()}
    peers = {f"eager{name}": partial(lambda run: run, run) for name, run in runs.items()}
    return peers | {f"compile{name}": partial(torch.compile, run, **how) for name, run in runs.items()}
