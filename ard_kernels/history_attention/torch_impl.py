"""Append a segment to the cache and attend to what it may see, as a composition of PyTorch ops."""

from __future__ import annotations

from torch import Tensor

from ard_kernels.block_causal_attention.torch_impl import as_output, attend, gather
from ard_kernels.history_attention.backend import Append
from ard_kernels.history_attention.norm import HeadNorm, normalise


def append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int) -> None:
    """See backend.py."""
    cache_k[:, :, start : start + k.shape[2]] = k
    cache_v[:, :, start : start + v.shape[2]] = v


def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor,
    start: int, sink_stop: int, window_start: int, scale: float, q_norm: HeadNorm | None, k_norm: HeadNorm | None,
    append: Append,
) -> Tensor:  # fmt: skip
    """`Kernels.forward` of backend.py, but out (B, H, L, D) with (B, L, H, D) memory is made here, and returned."""
    append(normalise(k, k_norm), v, cache_k, cache_v, start)
    stop = start + k.shape[2]
    ranges = [(0, sink_stop), (window_start, stop)] if sink_stop > 0 else [(window_start, stop)]
    return as_output(attend(normalise(q, q_norm), gather(cache_k, ranges), gather(cache_v, ranges), scale)[0])
