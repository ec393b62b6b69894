"""What a backend of history attention provides."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ard_kernels.history_attention.places import Place


class Kernels(Protocol):
    """q (B, H, L, D), k, v (B, H_kv, L, D) with a contiguous last dim, not empty; caches are one layer's."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
        place: Place, scale: float,
    ) -> None:  # fmt: skip
        """The caches (B, H_kv, capacity, D) get k and v at token `place.start`; out, which the op has allocated, the
        attention over their tokens `place.runs`. `workspace`: see `splits.py`."""
