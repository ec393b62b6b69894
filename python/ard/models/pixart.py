"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): text by cross attention, adaLN-single.

    c = t_emb(t)                          plus embeddings of the image's height, width and aspect (`size_conditions`)
    r = t_block(c)                        6C, one projection for all blocks; rows of block i = r + scale_shift_table_i

    x = x + gate_a * attention(LN(x) * (1 + scale_a) + shift_a)
    x = x + cross_attention(x, text)      no norm before it, no gate
    x = x + gate_m * mlp(LN(x) * (1 + scale_m) + shift_m)

and the final layer's (shift, scale) = c + its scale_shift_table. Text enters by cross attention only, so that a block's
keys and values of it are the same in every segment of a trajectory. Shape suffixes as in `trunk.py`, and

    N text tokens (E channels each, of T5)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ard.models.config import Condition, ModelConfig
from ard.models.convention import TRAIN_STEPS, Convention
from ard.models.dit import PatchTrunk
from ard.models.layers import (
    Attend,
    Attention,
    Context,
    Mlp,
    Pending,
    TimestepEmbedder,
    TwoLayers,
    linear,
    sincos_position_embedding,
)
from ard.models.trunk import Block, FinalLayer, Teacher
from ard_kernels import adaln_modulate, gate_residual, gate_residual_adaln

PIXELS = 8  # of an image along a side, for one of its latent: of the VAE that the released models take
_SIZES = {"256": 32, "512": 64, "1024": 128, "2K": 256}  # pixels -> latent


@dataclass(frozen=True)
class PixArtConfig(ModelConfig):
    """Sizes of a PixArt. The released ones differ from the defaults in input_size, position_scale (latent / 64), and

    alpha: `size_conditions` at 1024 pixels. Sigma: 300 text tokens; `learned_null` is False in diffusers' folders.
    """

    family: str = field(default="pixart", kw_only=True)
    learn_sigma: bool = True
    caption_channels: int = 4096  # E
    caption_tokens: int = 120  # N
    learned_null: bool = True  # has text of its own for guidance's unconditional branch
    size_conditions: bool = False
    position_scale: float = 1.0  # positions are token indices over this
    position_base: int | None = (
        None  # tokens along a side to which positions are stretched first; None: as many as rows
    )

    RANGES: ClassVar = {
        **ModelConfig.RANGES,
        "caption_channels": "[1, 65536]",
        "caption_tokens": "[1, 4096]",
        "position_scale": "(0, 64]",
        "position_base": "[1, 4096]",
    }
    CONVENTION: ClassVar = Convention("epsilon", "ddpm", noise_time=TRAIN_STEPS - 1, data_time=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size_conditions and self.hidden_size % 3:
            raise ValueError(
                f"PixArtConfig: hidden_size is {self.hidden_size}; expected a multiple of 3 with size_conditions"
            )

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> PixArtConfig:
        """PixArt-alpha-256, -512, -1024 or PixArt-sigma-256, -512, -1024, -2K, with any field overridden."""
        family, _, pixels = name.removeprefix("PixArt-").partition("-")
        if family not in ("alpha", "sigma") or pixels not in _SIZES or (family, pixels) == ("alpha", "2K"):
            known = [f"PixArt-{f}-{p}" for f in ("alpha", "sigma") for p in _SIZES if (f, p) != ("alpha", "2K")]
            raise ValueError(f"PixArtConfig.from_name: name is {name!r}; expected one of {', '.join(known)}")
        side, sigma = _SIZES[pixels], family == "sigma"
        scale = side / 64 if sigma else max(1.0, side / 64)  # alpha at 256 pixels was trained with positions of 512
        sizes = {"input_size": side, "position_scale": scale, "caption_tokens": 300 if sigma else 120}
        return cls(**{**sizes, "size_conditions": not sigma and pixels == "1024", **overrides})

    @property
    def conditions(self) -> tuple[Condition, ...]:
        text = Condition("text", (self.caption_tokens, self.caption_channels), "float32")
        return text, Condition("text_mask", (self.caption_tokens,), "bool")

    @property
    def out_channels(self) -> int:
        """Channels a final layer emits: epsilon, and sigma when `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def modulation_flops(self) -> int:
        return 2 * self.hidden_size * 6 * self.hidden_size

    @property
    def other_flops(self) -> int:
        """Cross attention, its queries and its output."""
        L, N, C = self.tokens, self.caption_tokens, self.hidden_size
        return self.depth * (2 * L * 2 * C * C + 4 * L * N * C)

    @property
    def context_flops(self) -> int:
        """The text's projection, its keys and values in every block; height, width and aspect."""
        N, C, part = self.caption_tokens, self.hidden_size, self.hidden_size // 3
        text = 2 * N * (self.caption_channels * C + C * C) + self.depth * 2 * N * 2 * C * C
        sizes = 3 * 2 * (self.frequency_embedding_size * part + part * part)
        return text + (sizes if self.size_conditions else 0)


class CaptionEmbedder(nn.Module):
    """Text (B, N, E) -> (B, N, C); and the text (N, E) that stands for none."""

    y_embedding: Tensor

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.y_proj = TwoLayers(config.caption_channels, config.hidden_size, config.hidden_size)
        if config.learned_null:
            self.register_buffer("y_embedding", torch.empty(config.caption_tokens, config.caption_channels))

    def forward(self, text_BNE: Tensor) -> Tensor:
        return self.y_proj(text_BNE.to(self.y_proj.fc1.weight.dtype))


class CrossAttention(nn.Module):
    """Tokens (B, T, C) read text: keys and values (B, H, N, D) of `keys_values`, those that the mask (B, N) shows.

    Where the mask shows none, nothing is read.
    """

    def __init__(self, config: PixArtConfig):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def keys_values(self, y_BNC: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_linear(y_BNC).unflatten(-1, (2, self.num_heads, -1))
        k_BHND, v_BHND = kv.permute(2, 0, 3, 1, 4).unbind()
        return k_BHND, v_BHND

    def forward(self, x_BTC: Tensor, k_BHND: Tensor, v_BHND: Tensor, mask_BN: Tensor) -> Tensor:
        q_BHTD = self.q_linear(x_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHND, v_BHND, attn_mask=mask_BN[:, None, None])
        return self.proj(out_BHTD.transpose(1, 2).flatten(2))


class PixArtBlock(Block):
    """See the formulas above; rows (shift, scale, gate)_attention, (shift, scale, gate)_mlp of each segment."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.attn = Attention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(config)
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.hidden_size))

    def rows(self, c: Tensor) -> Tensor:
        return c + self.scale_shift_table.flatten()

    def read_context(self, context: Context) -> Context:
        y_BNC, mask_BN = context
        return *self.cross_attn.keys_values(y_BNC), mask_BN

    def residuals(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        segment_length: int,
        rows_BSR: Tensor,
        context: Context,
    ) -> tuple[Tensor, Pending]:
        rows_BSR = rows_BSR.expand(len(x_BTC), -1, -1)  # samples that share their times share the rows
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows_BSR.chunk(6, dim=-1)
        if pending is None:
            y_BTC = adaln_modulate(x_BTC, shift_a, scale_a, segment_length=segment_length)
        else:
            x_BTC, y_BTC = gate_residual_adaln(x_BTC, *pending, shift_a, scale_a, segment_length=segment_length)
        x_BTC = gate_residual(x_BTC, self.attn(y_BTC, attend), gate_a, segment_length=segment_length)
        text_BTC = self.cross_attn(x_BTC, *context)
        x_BTC, y_BTC = gate_residual_adaln(x_BTC, text_BTC, None, shift_m, scale_m, segment_length=segment_length)
        return x_BTC, (self.mlp(y_BTC), gate_m)


class PixArtFinalLayer(FinalLayer):
    """Its rows are the conditioning plus a table (2, C)."""

    def add_modulation(self, config: ModelConfig) -> None:
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))

    def rows(self, c_BC: Tensor) -> Tensor:
        return (c_BC[:, None] + self.scale_shift_table).flatten(1)


class PixArtTrunk(PatchTrunk):
    """PixArt's embedders and blocks."""

    block_class = PixArtBlock
    final_layer_class = PixArtFinalLayer

    def add_embedders(self, config: PixArtConfig) -> None:
        C = config.hidden_size
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.y_embedder = CaptionEmbedder(config)
        if config.size_conditions:
            self.csize_embedder, self.ar_embedder = (TimestepEmbedder(config, C // 3) for _ in range(2))

    def positions(self) -> Tensor:
        rows, columns = self.config.grid_hw
        base = self.config.position_base or rows
        step_hw = tuple(base / tokens / self.config.position_scale for tokens in (rows, columns))
        return sincos_position_embedding(self.config.hidden_size, (rows, columns), cast("tuple[float, float]", step_hw))

    def condition(self, t_BS: Tensor, *conditions: Tensor) -> Tensor:
        """c_s = t_emb(t_s) (+ sizes): (B, S, C), or (1, S, C) of times (1, S)."""
        c_BSC = self.t_embedder(t_BS)
        if not self.config.size_conditions:
            return c_BSC
        height, width = self.config.input_hw
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        pixels = [torch.full((1,), float(PIXELS * side), device=c_BSC.device) for side in (height, width)]
        aspect = torch.full((1,), height / width, device=c_BSC.device)
        return c_BSC + torch.cat([self.csize_embedder(torch.cat(pixels)).flatten(), self.ar_embedder(aspect)[0]])

    def shared(self, c_BSC: Tensor) -> Tensor:
        """Rows (B, S, 6C) before each block's table is added."""
        return self.t_block(c_BSC)

    def context(self, *conditions: Tensor) -> Context:
        """Projected text (B, N, C) and its mask (B, N)."""
        text_BNE, mask_BN = conditions
        return self.y_embedder(text_BNE), mask_BN

    def summary(self, c_BC: Tensor, context: Context) -> Tensor:
        """The conditioning plus the mean of the projected text that the mask shows."""
        y_BNC, mask_BN = context
        shown_BN1 = mask_BN[..., None].to(y_BNC.dtype)
        return c_BC + (y_BNC * shown_BN1).sum(dim=1) / shown_BN1.sum(dim=1).clamp(min=1.0)

    def null_conditions(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """The model's own null text, as far as the prompt's mask shows it: so alpha was trained and is sampled."""
        text_BNE, mask_BN = conditions
        if not self.config.learned_null:
            raise ValueError(
                "null_conditions: the model has no null text (diffusers' folders have none); expected that of a "
                "negative prompt, such as trajectories.negative_prompt=''"
            )
        return self.y_embedder.y_embedding.to(text_BNE.dtype).expand_as(text_BNE), mask_BN

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the reference: Xavier linears, normal(0.02) embedders, zero outputs of cross attention and the end."""
        self.initialize_linears()
        self.initialize_patches()
        embedders = [self.t_embedder]
        if self.config.size_conditions:
            embedders += [self.csize_embedder, self.ar_embedder]
        small = [linear(embedder.mlp, layer) for embedder in embedders for layer in (0, 2)]
        # The text's projection stays Xavier's: at full size that is the reference's 0.02, which starves small ones.
        for layer in (*small, linear(self.t_block, 1)):
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.learned_null:
            nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5)
        for module in self.modules():
            if isinstance(module, (PixArtBlock, PixArtFinalLayer)):
                nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5)
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)


class PixArt(Teacher, PixArtTrunk):
    """The teacher: x (B, c, h, w), timesteps (B,) in [0, 1000), text (B, N, E) and its mask (B, N) bool -> epsilon,
    then sigma if it is learned, (B, out_channels, h, w)."""

    @property
    def predicted_channels(self) -> int:
        return self.config.out_channels
