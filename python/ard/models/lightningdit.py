"""LightningDiT (arXiv 2501.01423): RMSNorm with weight, rotary positions, SwiGLU. Path and labels as SiT's.

Rotary: a head's first half of D turns with the token's row, its second half with the column; the pair (2i, 2i + 1) of a
half turns by position * 10000^(-2i / (D / 2)). The tables, (L, D) as cos and sin, are stored with the weights, as the
published files do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ard.models.config import ClassConfig, ModelConfig
from ard.models.convention import Convention
from ard.models.dit import DiTBlock, DiTTrunk
from ard.models.layers import Attend, Pending
from ard.models.trunk import FinalLayer, Teacher
from ard_kernels import gate_residual_adaln, qk_norm_rope_packed

NORM_EPS = 1e-6


@dataclass(frozen=True)
class LightningDiTConfig(ClassConfig):
    """Sizes of a LightningDiT; the MLP's hidden width is 2/3 of `hidden_size * mlp_ratio`."""

    family: str = field(default="lightningdit", kw_only=True)
    input_size: int | tuple[int, int] = 16
    patch_size: int = 1
    in_channels: int = 32

    CONVENTION: ClassVar = Convention("velocity", "linear", noise_time=0.0, data_time=1.0)

    @property
    def mlp_hidden_size(self) -> int:
        return int(2 / 3 * int(self.hidden_size * self.mlp_ratio))

    @property
    def mlp_weights(self) -> int:
        return 3 * self.hidden_size * self.mlp_hidden_size


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight, over C: the weight, for the op that also modulates."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the adaLN ops that compute it."""
        return {"norm": "rms", "weight": self.weight, "eps": NORM_EPS}


class SwiGLU(nn.Module):
    """w3(silu(a) * b), (a, b) the halves of w12(y)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.mlp_hidden_size)
        self.w3 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, y_BTC: Tensor) -> Tensor:
        a, b = self.w12(y_BTC).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class RotaryTables(nn.Module):
    """cos and sin (L, D) of every token's angles."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(config.tokens, config.head_dim))

    @torch.no_grad()
    def fill(self, config: ModelConfig) -> None:
        """The tables from their formula, computed in float64."""
        rows, columns = config.grid_hw
        half = config.head_dim // 2
        frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
        row_L = torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)
        column_L = torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)
        angles_LD = torch.cat([(at[:, None] * frequency).repeat_interleave(2, dim=1) for at in (row_L, column_L)], 1)
        self.freqs_cos.copy_(angles_LD.cos())
        self.freqs_sin.copy_(angles_LD.sin())


@dataclass(frozen=True, eq=False)
class RotatedAttend:
    """`attend` after q and k of every segment have been turned by the tables, (L, D / 2): an entry for each pair."""

    attend: Attend
    cos_LP: Tensor
    sin_LP: Tensor

    def __call__(self, qkv: Tensor) -> Tensor:
        tables = self.cos_LP, self.sin_LP
        return self.attend(qk_norm_rope_packed(qkv, *tables, norm=None, segment_length=len(self.cos_LP)))


class LightningBlock(DiTBlock):
    """DiT's block with RMSNorm and SwiGLU."""

    mlp_class = SwiGLU

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.norm1, self.norm2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def norms(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.norm1.arguments, self.norm2.arguments


class LightningFinalLayer(FinalLayer):
    """With a normalization of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.norm_final = RMSNorm(config.hidden_size)


class LightningDiTTrunk(DiTTrunk):
    """DiT's embedders, LightningDiT's blocks and rotary tables."""

    block_class = LightningBlock
    final_layer_class = LightningFinalLayer

    def __init__(self, config: LightningDiTConfig):
        super().__init__(config)
        self.feat_rope = RotaryTables(config)

    def attend_as(self, attend: Attend) -> Attend:
        tables = (table[:, ::2].contiguous() for table in (self.feat_rope.freqs_cos, self.feat_rope.freqs_sin))
        return RotatedAttend(attend, *tables)

    def finish(self, x_BTC: Tensor, pending: Pending, rows_BSR: Tensor, final_layers: Sequence[FinalLayer]) -> Tensor:
        """linear(RMSNorm(x) * (1 + scale) + shift), the norm's weight that of the segment's layer."""
        L = self.config.tokens
        branch_BTC, gate_BSC = pending
        tokens = (tensor.split(L, dim=1) for tensor in (x_BTC, branch_BTC))
        rows = (tensor.split(1, dim=1) for tensor in (gate_BSC, rows_BSR))
        outputs = []
        for final, x_BLC, branch_BLC, gate_B1C, row_B1R in zip(final_layers, *tokens, *rows, strict=True):
            assert isinstance(final, LightningFinalLayer)
            shift_scale = row_B1R.expand(len(x_BTC), -1, -1).chunk(2, dim=-1)
            norm = final.norm_final.arguments
            _, y_BLC = gate_residual_adaln(x_BLC, branch_BLC, gate_B1C, *shift_scale, segment_length=L, **norm)
            outputs.append(final.linear(y_BLC))
        return torch.stack(outputs, dim=1)

    def check_buffers(self) -> None:
        """The rotary tables must be those of the grid, to the rounding of their dtype and of float32 angles."""
        super().check_buffers()
        expected = RotaryTables(self.config)
        expected.fill(self.config)
        for name, table in expected.named_buffers():
            given = self.feat_rope.get_buffer(name)
            error = float((given.cpu().double() - table.double()).abs().max())
            if not error <= 1e-5 + torch.finfo(given.dtype).eps:
                raise ValueError(f"feat_rope.{name} differs by {error:.3g} from that of {self.config.grid_hw} tokens")

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.feat_rope.fill(self.config)


class LightningDiT(Teacher, LightningDiTTrunk):
    """The teacher: x (B, c, h, w), times (B,) in [0, 1], labels (B,) -> velocity (B, c, h, w)."""
