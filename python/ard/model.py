"""Diffusion transformer (DiT, arXiv 2212.09748): blocks and the teacher.

Shape suffixes used here and in `student.py`:

    B batch   S segments   L tokens of one segment   T = S*L tokens   H heads   D head width   C = H*D model width
    R width of a modulation row (6C in a block, 2C in a final layer)   P = patch*patch*out_channels   chw latent

One `DiTBlock` serves teacher and student; the teacher is the case S = 1. Parameter names are the public checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ard.model_config import DiTConfig
from ard_kernels import adaln_modulate, block_causal_attention_packed, gate_residual_adaln

# packed q, k, v (B, T, 3, H, D) -> out (B, T, H, D)
Attend = Callable[[Tensor], Tensor]
# branch (B, T, C) and gate (B, S, C) of a residual that the next fused op adds: h = x + gate * branch
Pending = tuple[Tensor, Tensor]


def sincos_position_embedding(channels: int, grid_hw: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos positions (L, C) in float64, tokens in row-major order.

    The first half of C encodes the column, the second half the row, each as [sin, cos] (the public checkpoints' order).
    """
    rows, columns = grid_hw
    quarter = channels // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    row_L = torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)
    column_L = torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)
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

    def __init__(self, config: DiTConfig):
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
    """Timesteps (...,) -> (..., C): MLP over [cos, sin](t * 10000^(-i / half)), i < half = frequency_size / 2."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.frequency_size = config.frequency_embedding_size
        width = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(self.frequency_size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[..., None] * torch.exp(-math.log(10000.0) * index / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(linear(self.mlp, 0).weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) int64 -> (B, C). Row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class Attention(nn.Module):
    """Multi-head mixing of tokens (B, T, C); `attend` gets the packed qkv projection as it is, no copies."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, y_BTC: Tensor, attend: Attend) -> Tensor:
        B, T, C = y_BTC.shape
        qkv = self.qkv(y_BTC).view(B, T, 3, self.num_heads, C // self.num_heads)
        return self.proj(attend(qkv).reshape(B, T, C))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(y)))."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, y_BTC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(y_BTC), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-Zero block; with rows (shift, scale, gate)_attention, (shift, scale, gate)_mlp of each segment:

        x = x + gate_a * attention(LN(x) * (1 + scale_a) + shift_a)
        x = x + gate_m * mlp(LN(x) * (1 + scale_m) + shift_m)

    The second sum is left pending, so that the next block or final layer adds it in the op that also normalizes:
    every residual + LayerNorm + modulation is one pass over the tokens.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.recompute = False  # keep the inputs only, and run again in backward (activation checkpointing)
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        *,
        segment_length: int,
        c_BSC: Tensor | None = None,
        rows_BSR: Tensor | None = None,
    ) -> tuple[Tensor, Pending]:
        """Give either the conditioning `c_BSC` or its rows `rows_BSR = adaLN_modulation(c_BSC)`."""
        inputs = (x_BTC, pending, attend, segment_length, c_BSC, rows_BSR)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._residuals, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._residuals(*inputs)

    def _residuals(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        segment_length: int,
        c_BSC: Tensor | None,
        rows_BSR: Tensor | None,
    ) -> tuple[Tensor, Pending]:
        rows_BSR = self.adaLN_modulation(c_BSC) if rows_BSR is None else rows_BSR
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows_BSR.chunk(6, dim=-1)
        if pending is None:
            y_BTC = adaln_modulate(x_BTC, shift_a, scale_a, segment_length=segment_length)
        else:
            x_BTC, y_BTC = gate_residual_adaln(x_BTC, *pending, shift_a, scale_a, segment_length=segment_length)
        branch_BTC = self.attn(y_BTC, attend)
        x_BTC, y_BTC = gate_residual_adaln(x_BTC, branch_BTC, gate_a, shift_m, scale_m, segment_length=segment_length)
        return x_BTC, (self.mlp(y_BTC), gate_m)


class FinalLayer(nn.Module):
    """linear(LN(x) * (1 + scale) + shift); the trunk calls its two parts, as their token op spans all segments."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)


class DiTTrunk(nn.Module):
    """What teacher and student share: embedders, blocks, and the way from tokens back to images."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.hidden_size), requires_grad=False)
        blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.blocks = cast("Sequence[DiTBlock]", blocks)  # nn.ModuleList does not say of what

    def embed(self, states_BSchw: Tensor) -> Tensor:
        """States (B, S, c, h, w) -> tokens (B, T, C) with positions, the same in every segment."""
        B, S = states_BSchw.shape[:2]
        x_MLC = self.x_embedder(states_BSchw.flatten(0, 1)) + self.pos_embed
        return x_MLC.view(B, S * self.config.tokens, self.config.hidden_size)

    def condition(self, t_BS: Tensor, labels_B: Tensor) -> Tensor:
        """c_s = t_emb(t_s) + y_emb(y), (B, S, C); `t_BS` is (B, S), or (1, S) when all samples share the timesteps."""
        return self.t_embedder(t_BS) + self.y_embedder(labels_B)[:, None]

    def transform(
        self,
        x_BTC: Tensor,
        attend: Callable[[int], Attend],
        final_layers: Sequence[FinalLayer],
        *,
        c_BSC: Tensor | None = None,
        block_rows: Sequence[Tensor] | None = None,
        final_rows_BSR: Tensor | None = None,
    ) -> Tensor:
        """All blocks, then final layer s on segment s: (B, T, C) -> (B, S, L, P).

        `attend(layer)` is how that layer mixes tokens. In training it holds the mask and not the layer's number: equal
        values share one compiled graph. Modulation comes from `c_BSC`, or from the rows that `adaLN_modulation` and
        `final_rows` have computed beforehand.
        """
        L = self.config.tokens
        pending: Pending | None = None
        for layer, block in enumerate(self.blocks):
            rows_BSR = None if block_rows is None else block_rows[layer]
            x_BTC, pending = block(x_BTC, pending, attend(layer), segment_length=L, c_BSC=c_BSC, rows_BSR=rows_BSR)
        assert pending is not None  # depth >= 1
        if final_rows_BSR is None:
            assert c_BSC is not None
            final_rows_BSR = self.final_rows(c_BSC, final_layers)
        shift_BSC, scale_BSC = final_rows_BSR.chunk(2, dim=-1)
        _, y_BTC = gate_residual_adaln(x_BTC, *pending, shift_BSC, scale_BSC, segment_length=L)
        segments = y_BTC.split(L, dim=1)
        return torch.stack([f.linear(y_BLC) for f, y_BLC in zip(final_layers, segments, strict=True)], dim=1)

    @staticmethod
    def final_rows(c_BSC: Tensor, final_layers: Sequence[FinalLayer]) -> Tensor:
        """Modulation rows (B, S, 2C); row s is computed by final layer s."""
        rows_BR = [f.adaLN_modulation(c_BC) for f, c_BC in zip(final_layers, c_BSC.unbind(1), strict=True)]
        return torch.stack(rows_BR, dim=1)

    def unpatchify(self, tokens_BSLP: Tensor, channels: int) -> Tensor:
        """(B, S, L, P), P ordered (row in patch, column in patch, channel) -> the first `channels`, (B, S, c, h, w)."""
        B, S = tokens_BSLP.shape[:2]
        (rows, columns), p = self.config.grid_hw, self.config.patch_size
        x = tokens_BSLP.view(B, S, rows, columns, p, p, self.config.out_channels)[..., :channels]
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, S, channels, rows * p, columns * p)

    def check_inputs(self, name: str, images: Tensor, labels_B: Tensor, leading: tuple[str, ...]) -> None:
        """Raise unless `images` is (*leading, c, h, w) of the configured sizes and labels are (B,) integers."""
        chw = (self.config.in_channels, *self.config.input_hw)
        if images.ndim != len(leading) + 3 or tuple(images.shape[-3:]) != chw:
            expected = ", ".join((*leading, *map(str, chw)))
            raise ValueError(f"{name}: got {tuple(images.shape)}; expected ({expected})")
        if labels_B.shape != images.shape[:1] or labels_B.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"labels: got {tuple(labels_B.shape)} {labels_B.dtype}; expected ({images.shape[0]},) of torch.int64"
            )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the DiT reference: Xavier linears, normal(0.02) embeddings, zero adaLN and final linears."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.pos_embed.copy_(sincos_position_embedding(self.config.hidden_size, self.config.grid_hw)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            linear(self.t_embedder.mlp, 0).weight,
            linear(self.t_embedder.mlp, 2).weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (DiTBlock, FinalLayer)):
                nn.init.zeros_(linear(module.adaLN_modulation, 1).weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)


class DiT(DiTTrunk):
    """The teacher: x (B, c, h, w), timesteps (B,), labels (B,) -> (B, out_channels, h, w), epsilon, then sigma."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def forward(
        self,
        x_Bchw: Tensor,
        t_B: Tensor,
        labels_B: Tensor,
        *,
        class_dropout_prob: float = 0.0,
        force_drop: Tensor | None = None,
    ) -> Tensor:
        """Predict epsilon (and sigma) at the original timesteps `t_B` in [0, 1000).

        labels_B: int64 in [0, num_classes]; num_classes is the null label.
        force_drop: bool (B,), True replaces that label by the null label; without it each label is dropped with
            probability `class_dropout_prob` (classifier-free guidance training).
        """
        self.check_inputs("x", x_Bchw, labels_B, ("B",))
        if t_B.shape != labels_B.shape:
            raise ValueError(f"t: got {tuple(t_B.shape)}; expected ({labels_B.shape[0]},)")
        if force_drop is None and class_dropout_prob > 0:
            force_drop = torch.rand(labels_B.shape, device=labels_B.device) < class_dropout_prob
        if force_drop is not None:
            labels_B = labels_B.masked_fill(force_drop, self.config.num_classes)

        def attend(layer: int) -> Attend:
            return partial(block_causal_attention_packed, segment_length=self.config.tokens)

        c_BSC = self.condition(t_B[:, None], labels_B)
        tokens_BSLP = self.transform(self.embed(x_Bchw[:, None]), attend, [self.final_layer], c_BSC=c_BSC)
        return self.unpatchify(tokens_BSLP, self.config.out_channels)[:, 0]
