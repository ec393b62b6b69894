"""History as coarse information: keys and values of earlier segments are read average-pooled over the token grid.

Shape suffixes as in `trunk.py`; p: tokens along a side of a pool. A segment's L / p^2 pooled keys are means of the keys
of p x p neighbouring tokens, as attention gets them (where a family rotates them, of rotated ones); values likewise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ard_kernels import SegmentMask, segment_attention
from ard_kernels.common.arguments import described, is_int


def check_pool(where: str, pool: int, grid_hw: tuple[int, int]) -> None:
    """Raises ValueError unless pools of `pool` x `pool` tokens tile the grid."""
    if not is_int(pool) or pool < 1 or any(side % pool for side in grid_hw):
        got = described(pool)
        raise ValueError(f"{where} is {got}; expected an int that divides both sides of the token grid, {grid_hw}")


@lru_cache(maxsize=256)
def pooled_mask(segments: int, window: int | None, sink: int) -> SegmentMask:
    """S x 2S over the key segments [pooled 0 .. S-1 | whole 0 .. S-1]: s sees itself whole and, pooled, those before it
    that a block-causal mask of this window and sink shows it. It is the noisy half of a teacher-forcing mask."""
    window = None if window is None else min(window, segments)
    return SegmentMask(SegmentMask.teacher_forcing(segments, window, min(sink, segments)).dense(1)[segments:])


@lru_cache(maxsize=256)
def step_mask(segment: int, window: int | None, sink: int) -> SegmentMask:
    """1 x (s + 1): the row of `pooled_mask` of segment s, over [pooled 0 .. s-1 | whole s]."""
    row = pooled_mask(segment + 1, window, sink).dense(1)[segment]
    return SegmentMask(torch.cat([row[:segment], row[-1:]])[None])


def pool_tokens(x_BT: Tensor, grid_hw: tuple[int, int], pool: int) -> Tensor:
    """(B, S * L, ...) -> (B, S * L / p^2, ...): means of p x p neighbours in each segment's grid, row by row."""
    rows, columns = grid_hw
    x = x_BT.unflatten(1, (-1, rows // pool, pool, columns // pool, pool))
    return x.mean(dim=(3, 5)).flatten(1, 3)


def pooled_attention(qkv_BT3HD: Tensor, *, mask: SegmentMask, grid_hw: tuple[int, int], pool: int) -> Tensor:
    """All segments at once (training): (B, T, 3, H, D) -> (B, T, H, D). mask: a `pooled_mask`."""
    rows, columns = grid_hw
    S, L = mask.query_segments, rows * columns
    q, kv = qkv_BT3HD[:, :, 0], qkv_BT3HD[:, :, 1:]
    k, v = torch.cat([pool_tokens(kv, grid_hw, pool), kv], dim=1).unbind(2)
    lengths = [L // pool**2] * S + [L] * S
    return segment_attention(q, k, v, mask, segment_length=L, key_segment_length=lengths, layout="bthd")


class PooledCache:
    """Pooled keys and values of earlier segments, allocated once for `steps` segments, with room for the newest whole.

    memory: (layers, B, (S - 1) * L / p^2 + L, 2, H, D), keys and values of each token side by side.
    """

    def __init__(
        self, *, layers: int, batch: int, heads: int, head_dim: int, steps: int, grid_hw: tuple[int, int], pool: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.grid_hw, self.pool, self.steps = grid_hw, pool, steps
        self.segment_length = grid_hw[0] * grid_hw[1]
        self.pooled_length = self.segment_length // pool**2
        tokens = (steps - 1) * self.pooled_length + self.segment_length
        self.memory = torch.empty(layers, batch, tokens, 2, heads, head_dim, dtype=dtype, device=device)
        self.segments = [0] * layers  # held, by each layer

    def reset(self) -> None:
        """Forget every segment; the memory stays."""
        self.segments = [0] * len(self.segments)

    @torch.compiler.disable  # where it stands would be a constant of each graph
    def attend(self, layer: int, qkv_BL3HD: Tensor, *, window: int | None, sink: int) -> Tensor:
        """Attention of a new segment to itself whole and to the pooled past, (B, L, 3, H, D) -> (B, L, H, D).

        window, sink: as in `pooled_mask`. Its own keys and values stand behind the past, and are pooled there after.
        Raises ValueError for a segment beyond `steps`, or of another shape or dtype than the cache's.
        """
        s, memory = self.segments[layer], self.memory[layer]
        expected = (len(memory), self.segment_length, 3, *memory.shape[-2:])
        if s == self.steps:
            raise ValueError(f"PooledCache: layer {layer} holds {s} segments; expected a reset after steps={s}")
        if tuple(qkv_BL3HD.shape) != expected or qkv_BL3HD.dtype != memory.dtype:
            got = f"{tuple(qkv_BL3HD.shape)} {qkv_BL3HD.dtype}"
            raise ValueError(f"PooledCache: qkv is {got}; expected {expected} {memory.dtype}")
        q, kv = qkv_BL3HD[:, :, 0], qkv_BL3HD[:, :, 1:]
        start, L = s * self.pooled_length, self.segment_length
        memory[:, start : start + L] = kv
        k, v = memory[:, : start + L].unbind(2)
        mask, lengths = step_mask(s, window, sink), [self.pooled_length] * s + [L]
        out = segment_attention(q, k, v, mask, segment_length=L, key_segment_length=lengths, layout="bthd")
        memory[:, start : start + self.pooled_length] = pool_tokens(kv, self.grid_hw, self.pool)
        self.segments[layer] = s + 1
        return out
