"""Layers that families share. Shape suffixes as in `trunk.py`. Parameter names are the public checkpoints'."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ard_kernels
from ard.models.config import ClassConfig, ModelConfig

# packed q, k, v (B, T, 3, H, D) -> out (B, T, H, D)
Attend = Callable[[Tensor], Tensor]
# what blocks read besides their modulation, (B, ...) each, the same in every segment
Context = tuple[Tensor, ...]
# what a block computes of times and conditions alone: modulation rows (B or 1, S, R), and its own form of the context
Prepared = tuple[Tensor, Context]
# branch (B, T, C) and gate (B, S, C) of a residual that the next fused op adds: h = x + gate * branch
Pending = tuple[Tensor, Tensor]


def sincos_position_embedding(
    channels: int, grid_hw: tuple[int, int], step_hw: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Fixed 2-D sin-cos positions (L, C) in float64, tokens in row-major order.

    The first half of C encodes the column, the second half the row, each as [sin, cos] (the public checkpoints' order).
    step_hw: between the positions of neighbouring rows, and columns.
    """
    rows, columns = grid_hw
    quarter = channels // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    row_L = step_hw[0] * torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)
    column_L = step_hw[1] * torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)
    angles = [position_L[:, None] * omega for position_L in (column_L, row_L)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def linear(layers: nn.Sequential, index: int) -> nn.Linear:
    """A layer of a sequence that is known to be linear."""
    layer = layers[index]
    assert isinstance(layer, nn.Linear)
    return layer


class PatchEmbed(nn.Module):
    """Images (M, c, h, w) -> tokens (M, L, C): a convolution with kernel = stride = patch.

    Such a convolution is one matrix product over flattened patches; written so, the tokens come out contiguous in C.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x_Mchw: Tensor) -> Tensor:
        M, c, h, w = x_Mchw.shape
        p = self.proj.kernel_size[0]
        rows, columns = h // p, w // p
        patches = x_Mchw.reshape(M, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        patches_MLK = patches.reshape(M, rows * columns, c * p * p)
        return F.linear(patches_MLK, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Numbers (...,) -> (..., width): MLP over [cos, sin](t * 10000^(-i / half)), i < half = frequency_size / 2.

    width: C by default.
    """

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        self.frequency_size = config.frequency_embedding_size
        width = config.hidden_size if width is None else width
        self.mlp = nn.Sequential(nn.Linear(self.frequency_size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        index = torch.arange(half, dtype=t.dtype, device=t.device)
        angles = t[..., None] * torch.exp(-math.log(10000.0) * index / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(linear(self.mlp, 0).weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) int64 -> (B, C). Row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, config: ClassConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class Attention(nn.Module):
    """Multi-head mixing of tokens (B, T, C); `attend` gets the packed qkv projection as it is, no copies."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, y_BTC: Tensor, attend: Attend) -> Tensor:
        B, T, C = y_BTC.shape
        qkv = self.qkv(y_BTC).view(B, T, 3, self.num_heads, C // self.num_heads)
        return self.proj(attend(qkv).reshape(B, T, C))


class TwoLayers(nn.Module):
    """fc2(gelu_tanh(fc1(y))) over the last dimension."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(ard_kernels.gelu(self.fc1(y)))


class Mlp(TwoLayers):
    """A block's MLP, of C channels."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.mlp_hidden_size, config.hidden_size)
