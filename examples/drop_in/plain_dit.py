"""A DiT block (arXiv 2212.09748, adaLN-Zero) whose tokens come in segments, each with a condition of its own."""

from __future__ import annotations

import torch
from torch import nn

from ard_kernels import adaln_modulate, block_causal_attention, gate_residual, gate_residual_adaln


class DiTBlock(nn.Module):
    """x (B, S * L, C), conditions (B, S, C), one per segment -> (B, S * L, C). A segment sees itself and the past."""

    def __init__(self, channels: int, heads: int, segment_length: int, window: int | None = None, sink: int = 0):
        super().__init__()
        self.heads, self.segment_length, self.window, self.sink = heads, segment_length, window, sink
        self.rows = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU("tanh"), nn.Linear(4 * channels, channels))

    def attention(self, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, D), read in place
        past = {"window": self.window, "sink": self.sink}
        out = block_causal_attention(q, k, v, segment_length=self.segment_length, **past, layout="bthd")
        return self.proj(out.flatten(2))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        # One row per segment, never one per token: S rows through the widest linear of the block instead of S * L.
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.rows(condition).chunk(6, dim=-1)
        length = {"segment_length": self.segment_length}
        branch = self.attention(adaln_modulate(x, shift, scale, **length))
        x, y = gate_residual_adaln(x, branch, gate, mlp_shift, mlp_scale, **length)
        return gate_residual(x, self.mlp(y), mlp_gate, **length)
