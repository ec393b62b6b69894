"""History attention, said once: which cached tokens a new segment sees, and validation.

The cache holds segments 0 .. s-1 of a layer; the new segment s sees, as in block-causal attention, the tokens
[0, sink_stop) of the first `sink` segments and [window_start, stop) of its window, its own included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.block_causal_attention.spec import key_ranges


def visible_tokens(offsets: Sequence[int], window: int | None, sink: int) -> tuple[int, int]:
    """(sink_stop, window_start) for the last segment of `offsets` (S + 1 entries); no sink apart from the window: 0."""
    ranges = key_ranges(offsets, len(offsets) - 2, window, sink)
    if len(ranges) == 1:
        return 0, ranges[0][0]
    return ranges[0][1], ranges[1][0]


def check_cache(op: str, cache, layer: int, k_BHTD: torch.Tensor) -> None:
    """ValueError unless `cache` has room in `layer` for k (B, H, L, D) and agrees with it; the cache is untouched."""
    if not 0 <= layer < cache.layers:
        raise ValueError(f"{op}: layer is {layer}; expected 0 to {cache.layers - 1}")
    B, H, L, D = k_BHTD.shape
    expected = (cache.batch, cache.heads, cache.head_dim)
    if expected != (B, H, D):
        raise ValueError(f"{op}: k has (batch, heads, head_dim) {(B, H, D)}; expected the cache's {expected}")
    if k_BHTD.dtype != cache.dtype:
        raise ValueError(f"{op}: k has dtype {k_BHTD.dtype}; expected the cache's {cache.dtype}")
    if k_BHTD.device != cache.device:
        raise ValueError(f"{op}: k is on {k_BHTD.device}; expected the cache's {cache.device}")
    if L < 1:
        raise ValueError(f"{op}: k has {L} tokens; expected a segment of at least 1")
    held = cache.offsets[layer][-1]
    if held + L > cache.capacity:
        raise ValueError(
            f"{op}: layer {layer} of the cache holds {held} of {cache.capacity} tokens; expected room for {L} more "
            "(reset() empties it)"
        )
