"""A small causal video diffusion transformer, built like Wan: modulation per frame, 3-axis RoPE, cross attention.

Flow matching: x_t = (1 - t) data + t noise, v = noise - data = (x_t - data) / t; the last layer predicts the data.
B clips, F frames of L tokens, C = H D channels. Every norm, rotation, modulation and attention is an op of ard_kernels.
"""

from __future__ import annotations

import math

import torch
from moving import CLASSES, SIDE
from torch import nn

from ard_kernels import (
    HistoryCache,
    SegmentMask,
    adaln_modulate,
    gate_residual,
    gate_residual_adaln,
    history_attention,
    qk_norm_rope,
    segment_attention,
)

PATCH = 8
GRID = SIDE // PATCH
L = GRID * GRID  # tokens of a frame
HEADS, HEAD_DIM, DEPTH = 3, 32, 4
C = HEADS * HEAD_DIM
PAIRS = (4, 6, 6)  # of the D/2 rotated pairs: frame, row, column
THETA = 10.0  # of the rotary embedding
SMALLEST_T = 0.05  # what v is divided by at least


def rope_tables(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (F * L, D/2) of the tokens of frames at the places `frame` (F,) in time."""
    place = torch.arange(GRID).float()
    axes = torch.meshgrid(frame.float(), place, place, indexing="ij")
    angles = [
        math.pi / 2 * position.reshape(-1, 1) * THETA ** -(torch.arange(pairs) / pairs)
        for position, pairs in zip(axes, PAIRS, strict=True)
    ]
    angle = torch.cat(angles, -1)
    return angle.cos(), angle.sin()


def times(steps: int) -> torch.Tensor:
    """1 = t_0 > t_1 > .. = 0 (steps + 1,): closer together at a large t, where it is decided where the digit goes."""
    even = torch.linspace(1, 0, steps + 1)
    return 3 * even / (1 + 2 * even)


def heads(x: torch.Tensor) -> torch.Tensor:
    """(B, T, C) -> (B, T, H, D)"""
    return x.unflatten(-1, (HEADS, HEAD_DIM))


class Past:
    """What a block's attention needs beside its tokens: how the frames lie in time and who sees whom.

    In training `mask` is that of [clean | noisy]; in a rollout `cache` holds the past, and `commit` says whether it
    takes this frame too.
    """

    def __init__(
        self,
        frame: torch.Tensor,
        mask: SegmentMask | None = None,
        cache: HistoryCache | None = None,
        commit: bool = False,
        frame_for_sink: torch.Tensor | None = None,
    ):
        self.mask, self.cache, self.commit = mask, cache, commit
        self.tables = rope_tables(frame)
        self.tables_for_sink = None if frame_for_sink is None else rope_tables(frame_for_sink)


class SelfAttention(nn.Module):
    """Wan's: q and k normalised over all channels, rotated by time, row and column."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q_weight, self.k_weight = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        nn.init.orthogonal_(self.qkv.weight[2 * C :].data)
        self.out.weight.data.copy_(self.qkv.weight[2 * C :].T)

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        raw, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        settings = {"over": "all", "layout": "bthd"}
        q, k = qk_norm_rope(raw, k, *past.tables, q_weight=self.q_weight, k_weight=self.k_weight, **settings)
        if past.cache is None:
            out = segment_attention(q, k, v, past.mask, segment_length=L, layout="bthd")
        else:
            # The sink's keys stay where they were rotated; a query rotated for them brings them as near as in training.
            q_sink = None
            if past.tables_for_sink is not None:
                q_sink = qk_norm_rope(raw, None, *past.tables_for_sink, q_weight=self.q_weight, **settings)
            out = history_attention(
                q, k, v, past.cache, layer=self.layer, commit=past.commit, q_sink=q_sink, layout="bthd"
            )
        return self.out(out.flatten(2))


class CrossAttention(nn.Module):
    """To two tokens: silence, which every frame hears, and the class of the digit, which only the first frame hears."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, hears: SegmentMask) -> torch.Tensor:
        k, v = (heads(part) for part in self.kv(prompt).chunk(2, -1))
        out = segment_attention(heads(self.q(x)), k, v, hears, segment_length=L, key_segment_length=1, layout="bthd")
        return self.out(out.flatten(2))


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, C) / C**0.5)
        self.attention, self.cross = SelfAttention(layer), CrossAttention()
        self.norm3 = nn.LayerNorm(C)  # its affine alone, no modulation
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU("tanh"), nn.Linear(4 * C, C))

    def forward(self, x, time_BF6C, past: Past, prompt, hears: SegmentMask) -> torch.Tensor:
        rows = (self.table + time_BF6C).chunk(6, dim=2)  # (B, F, 1, C) each
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows
        y = adaln_modulate(x, shift, scale, segment_length=L)
        y = self.attention(y, past)
        norm3 = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        x, y = gate_residual_adaln(x, y, gate, **norm3, segment_length=L)
        y = self.cross(y, prompt, hears)
        x, y = gate_residual_adaln(x, y, None, mlp_shift, mlp_scale, segment_length=L)
        return gate_residual(x, self.mlp(y), mlp_gate, segment_length=L)


class VideoDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, C)
        self.place = nn.Parameter(torch.randn(L, C) * 0.5)  # walls are at absolute places, which RoPE does not tell
        self.prompt = nn.Embedding(1 + CLASSES, C)  # row 0 is silence
        self.time = nn.Sequential(nn.Linear(64, C), nn.SiLU(), nn.Linear(C, C))
        self.rows = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(Block(layer) for layer in range(DEPTH))
        self.table = nn.Parameter(torch.randn(2, C) / C**0.5)
        self.head = nn.Linear(C, PATCH * PATCH)
        nn.init.zeros_(self.rows[1].weight)
        nn.init.zeros_(self.rows[1].bias)
        nn.init.orthogonal_(self.patches.weight)  # with what follows, copying a patch is what the network begins with
        self.head.weight.data.copy_(self.patches.weight.T)

    def forward(
        self, video: torch.Tensor, t: torch.Tensor, classes: torch.Tensor, first: list[bool], past: Past
    ) -> torch.Tensor:
        """v (B, F, 32, 32) of video (B, F, 32, 32) at times t (B, F) in [0, 1].

        classes: (B,) of the digits; only frames whose `first` is True hear them.
        """
        B, frames = t.shape
        x = video.view(B, frames, GRID, PATCH, GRID, PATCH).transpose(3, 4).reshape(B, frames * L, PATCH * PATCH)
        x = self.patches(x) + self.place.repeat(frames, 1)
        prompt = self.prompt(torch.stack((torch.zeros_like(classes), 1 + classes), 1))
        hears = SegmentMask([[True, is_first] for is_first in first])
        angle = 1000 * t[..., None] * 10000.0 ** -(torch.arange(32) / 32)
        time = self.time(torch.cat((angle.cos(), angle.sin()), -1))
        rows = self.rows(time).unflatten(-1, (6, C))
        for block in self.blocks:
            x = block(x, rows, past, prompt, hears)
        shift, scale = (self.table + time[:, :, None]).chunk(2, dim=2)
        x = self.head(adaln_modulate(x, shift, scale, segment_length=L))
        data = x.view(B, frames, GRID, GRID, PATCH, PATCH).transpose(3, 4).reshape(B, frames, SIDE, SIDE)
        return (video - data) / t[..., None, None].clamp(min=SMALLEST_T)
