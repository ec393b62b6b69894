"""Append a segment to the cache and attend to what it may see, as a composition of PyTorch ops."""

from __future__ import annotations

import torch

from ard_kernels.block_causal_attention.torch_impl import as_output, attend, gather


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    return None


def append(k, v, cache_k, cache_v, start: int) -> None:
    """cache[:, :, start : start + L] = (k, v)."""
    cache_k[:, :, start : start + k.shape[2]] = k
    cache_v[:, :, start : start + v.shape[2]] = v


def attend_to_cache(q, cache_k, cache_v, stop: int, sink_stop: int, window_start: int, scale: float) -> torch.Tensor:
    """out, as out_like's: attention over the tokens [0, sink_stop) and [window_start, stop) of the cache."""
    ranges = [(0, sink_stop), (window_start, stop)] if sink_stop > 0 else [(window_start, stop)]
    return as_output(attend(q, gather(cache_k, ranges), gather(cache_v, ranges), scale)[0])


def forward(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale) -> torch.Tensor:
    """out (B, H, L, D); the cache then holds the new segment at `start`."""
    append(k, v, cache_k, cache_v, start)
    return attend_to_cache(q, cache_k, cache_v, start + q.shape[2], sink_stop, window_start, scale)
