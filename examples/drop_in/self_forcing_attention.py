"""Causal self-attention of a Self-Forcing style video model: q/k RMSNorm over all channels, 3-axis RoPE, rolling cache.

A chunk of frames is denoised in some calls that keep nothing; then a call on the clean chunk keeps its keys and values.
"""

from __future__ import annotations

import torch
from torch import nn

from ard_kernels import HistoryCache, history_attention, qk_norm_rope


def rope_tables(chunk: int, frames: int, height: int, width: int, pairs: tuple[int, int, int], theta: float = 10000.0):
    """cos and sin (frames * height * width, sum(pairs)) of the tokens of chunk number `chunk` of a stream.

    pairs: how many of the D/2 rotated pairs turn with the frame, the row and the column.
    """
    axes = torch.meshgrid(
        chunk * frames + torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    turns = [theta ** -(torch.arange(n, dtype=torch.float64) / n) for n in pairs]
    angle = torch.cat([axis.reshape(-1, 1) * turn for axis, turn in zip(axes, turns, strict=True)], dim=1)
    return angle.cos().float(), angle.sin().float()


class CausalAttention(nn.Module):
    """One layer. x (B, L, C) holds the L tokens of one chunk; `layer` is its row of the cache."""

    def __init__(self, channels: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q, self.k, self.v, self.o = (nn.Linear(channels, channels) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(channels, eps=1e-6), nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor, rope: tuple, cache: HistoryCache, commit: bool = False) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        weights = {"q_weight": self.norm_q.weight, "k_weight": self.norm_k.weight}
        q, k = qk_norm_rope(q, k, *rope, norm="rms", over="all", **weights, layout="bthd")
        out = history_attention(q, k, v, cache, layer=self.layer, commit=commit, layout="bthd")
        return self.o(out.flatten(2))
