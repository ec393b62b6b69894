"""What a backend of history attention provides: kernels for the whole op, or an append before PyTorch's attention."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ard_kernels.history_attention.norm import HeadNorm


class Kernels(Protocol):
    """q, k, v (B, H, L, D) with a contiguous last dim, not empty; the caches one layer's (B, H, capacity, D)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
        start: int, sink_stop: int, window_start: int, scale: float, q_norm: HeadNorm | None, k_norm: HeadNorm | None,
    ) -> None:  # fmt: skip
        """The cache gets k_norm(k) and v at token `start`; out, which the op has allocated, the attention of q_norm(q).

        Over the cache's tokens [0, sink_stop) and [window_start, start + L). `workspace`: see `splits.py`.
        """


class Append(Protocol):
    def __call__(self, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int) -> None:
        """cache[:, :, start : start + L] = (k, v)."""
