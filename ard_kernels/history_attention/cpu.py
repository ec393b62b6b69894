"""History attention in C++ (csrc/history_attention/cpu.cpp): makes tiles, passes pointers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.cpu import refuses
from ard_kernels.block_causal_attention.cpu_tiles import tiles_of
from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.common import extension
from ard_kernels.history_attention.places import Place

__all__ = ["forward", "refuses"]


@lru_cache(maxsize=1024)
def _tiles(rows: int, runs: tuple[Run, ...]) -> Any:
    return extension.module.AttentionTiles(*tiles_of([0, rows], [runs], across=False))


def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
    place: Place, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    B, H, L, D = q.shape
    shape = B, H, k.shape[1], L, cache_k.shape[2], D
    how = shape, extension.dtype_code(q.dtype), scale, torch.get_num_threads()
    views = map(extension.heads_view, (q, k, v, cache_k, cache_v, out))
    extension.module.history_attention(_tiles(L, tuple(place.runs)), *how, *views, place.start)
