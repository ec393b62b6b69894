"""DiT (arXiv 2212.09748): class labels, adaLN-Zero, epsilon and sigma. Shape suffixes as in `trunk.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ard.models.config import ClassConfig, ModelConfig
from ard.models.convention import TRAIN_STEPS, Convention
from ard.models.layers import (
    Attend,
    Attention,
    Context,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    Pending,
    TimestepEmbedder,
    linear,
    sincos_position_embedding,
)
from ard.models.trunk import Block, FinalLayer, Teacher, Trunk
from ard_kernels import adaln_modulate, gate_residual_adaln

_PRESETS = {  # size -> (hidden_size, depth, num_heads)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
_PRESET_PATCHES = (2, 4, 8)


@dataclass(frozen=True)
class DiTConfig(ClassConfig):
    """Sizes of a DiT; `learn_sigma`: final layers emit as many channels again."""

    family: str = field(default="dit", kw_only=True)
    learn_sigma: bool = True

    CONVENTION: ClassVar = Convention("epsilon", "ddpm", noise_time=TRAIN_STEPS - 1, data_time=0.0)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> DiTConfig:
        """Preset such as "DiT-XL/2" (sizes S, B, L, XL; patches 2, 4, 8), with any field overridden."""
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if name[:4] != "DiT-" or size not in _PRESETS or patch not in map(str, _PRESET_PATCHES):
            known = ", ".join(f"DiT-{f}/{p}" for f in _PRESETS for p in _PRESET_PATCHES)
            raise ValueError(f"DiTConfig.from_name: name is {name!r}; expected one of {known}")
        hidden_size, depth, num_heads = _PRESETS[size]
        sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**{**sizes, **overrides})

    @property
    def out_channels(self) -> int:
        """Channels a final layer emits: epsilon, and sigma when `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class DiTBlock(Block):
    """adaLN-Zero block; with rows (shift, scale, gate)_attention, (shift, scale, gate)_mlp of each segment:

        x = x + gate_a * attention(LN(x) * (1 + scale_a) + shift_a)
        x = x + gate_m * mlp(LN(x) * (1 + scale_m) + shift_m)

    The second sum is left pending, so that the next block or final layer adds it in the op that also normalizes:
    every residual + LayerNorm + modulation is one pass over the tokens.
    """

    mlp_class: Callable[[ModelConfig], nn.Module] = Mlp

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = self.mlp_class(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def residuals(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        segment_length: int,
        rows_BSR: Tensor,
        context: Context,
    ) -> tuple[Tensor, Pending]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows_BSR.chunk(6, dim=-1)
        norm_a, norm_m = ({"segment_length": segment_length, **norm} for norm in self.norms())
        if pending is None:
            y_BTC = adaln_modulate(x_BTC, shift_a, scale_a, **norm_a)
        else:
            x_BTC, y_BTC = gate_residual_adaln(x_BTC, *pending, shift_a, scale_a, **norm_a)
        branch_BTC = self.attn(y_BTC, attend)
        x_BTC, y_BTC = gate_residual_adaln(x_BTC, branch_BTC, gate_a, shift_m, scale_m, **norm_m)
        return x_BTC, (self.mlp(y_BTC), gate_m)

    def norms(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the adaLN ops for the norms before attention and before the MLP: plain LayerNorms."""
        return {}, {}


class PatchTrunk(Trunk):
    """Patches with fixed sin-cos positions, embedded times, blocks, a modulated LayerNorm at the end."""

    block_class: type[Block]
    fixed = ("pos_embed",)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.add_embedders(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.hidden_size), requires_grad=False)
        make: Any = self.block_class
        blocks = nn.ModuleList(make(config) for _ in range(config.depth))
        self.blocks = cast("Sequence[Block]", blocks)  # nn.ModuleList does not say of what

    def add_embedders(self, config: Any) -> None:
        """Those of the family's conditions."""

    def positions(self) -> Tensor:
        """The table (L, C) that `pos_embed` holds, float64."""
        return sincos_position_embedding(self.config.hidden_size, self.config.grid_hw)

    def check_buffers(self) -> None:
        """The positions must be those of the config, of which tensors show no more than the number of tokens."""
        # Those of another grid or scale differ by about 1. DiT's trainer averages them like weights, which in float32
        # moves them by 1.7e-4.
        error = float((self.pos_embed.detach().cpu().double()[0] - self.positions()).abs().max())
        if not error <= 1e-2:
            scale = getattr(self.config, "position_scale", None)
            of = "" if scale is None else f" with position_scale={scale:g}"
            raise ValueError(f"pos_embed differs by {error:.3g} from that of {self.config.grid_hw} tokens{of}")

    def embed(self, states_BSchw: Tensor) -> Tensor:
        B, S = states_BSchw.shape[:2]
        x_MLC = self.x_embedder(states_BSchw.flatten(0, 1)) + self.pos_embed
        return x_MLC.view(B, S * self.config.tokens, self.config.hidden_size)

    def finish(self, x_BTC: Tensor, pending: Pending, rows_BSR: Tensor, final_layers: Sequence[FinalLayer]) -> Tensor:
        """linear(LN(x) * (1 + scale) + shift); the token op spans all segments."""
        L = self.config.tokens
        shift_BSC, scale_BSC = rows_BSR.expand(len(x_BTC), -1, -1).chunk(2, dim=-1)
        _, y_BTC = gate_residual_adaln(x_BTC, *pending, shift_BSC, scale_BSC, segment_length=L)
        segments = y_BTC.split(L, dim=1)
        return torch.stack([f.linear(y_BLC) for f, y_BLC in zip(final_layers, segments, strict=True)], dim=1)

    @torch.no_grad()
    def initialize_patches(self) -> None:
        """The positions; and the patches' projection, as a linear."""
        self.pos_embed.copy_(self.positions()[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)


class DiTTrunk(PatchTrunk):
    """DiT's embedders and blocks; families with the same embedders replace the block and what finishes."""

    block_class: type[Block] = DiTBlock

    def add_embedders(self, config: ClassConfig) -> None:
        self.y_embedder = LabelEmbedder(config)

    def condition(self, t_BS: Tensor, *conditions: Tensor) -> Tensor:
        """c_s = t_emb(t_s) + y_emb(y), (B, S, C)."""
        (labels_B,) = conditions
        return self.t_embedder(t_BS) + self.y_embedder(labels_B)[:, None]

    def null_conditions(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """The null label, of the embedding's last row."""
        return tuple(torch.full_like(labels_B, self.config.num_classes) for labels_B in conditions)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the DiT reference: Xavier linears, normal(0.02) embeddings, zero adaLN and final linears."""
        self.initialize_linears()
        self.initialize_patches()
        for weight in (
            self.y_embedder.embedding_table.weight,
            linear(self.t_embedder.mlp, 0).weight,
            linear(self.t_embedder.mlp, 2).weight,
        ):
            nn.init.normal_(weight, std=0.02)
        self.zero_outputs()


class DiT(Teacher, DiTTrunk):
    """The teacher: x (B, c, h, w), timesteps (B,) in [0, 1000), labels (B,) -> (B, out_channels, h, w): epsilon, then
    sigma if it is learned. Labels are in [0, num_classes]; num_classes is the null label."""

    @property
    def predicted_channels(self) -> int:
        return self.config.out_channels
