"""Sizes of a diffusion transformer (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ard.config import Ranged
from ard_kernels.block_causal_attention.spec import MAX_HEAD_DIM

_PRESETS = {  # family -> (hidden_size, depth, num_heads)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
_PRESET_PATCHES = (2, 4, 8)


@dataclass(frozen=True)
class DiTConfig(Ranged):
    """Sizes of a DiT. `input_size` is the height = width of the latent, or (height, width)."""

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    frequency_embedding_size: int = 256

    RANGES: ClassVar = {
        "input_size": "[1, 4096]",
        "patch_size": "[1, 256]",
        "in_channels": "[1, 1024]",
        "hidden_size": "[1, 16384]",
        "depth": "[1, 1024]",
        "num_heads": "[1, 16384]",
        "mlp_ratio": "(0, 64]",
        "num_classes": "[1, 1000000]",
        "frequency_embedding_size": "[2, 16384]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % self.patch_size for side in self.input_hw):
            raise ValueError(
                f"DiTConfig: input_size is {self.input_size}; expected multiples of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"DiTConfig: hidden_size is {self.hidden_size}; expected a multiple of num_heads={self.num_heads}"
            )
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"DiTConfig: hidden_size is {self.hidden_size} with num_heads={self.num_heads}, heads of width "
                f"{self.head_dim}; expected a multiple of 8 up to {MAX_HEAD_DIM}, which attention takes"
            )
        if self.frequency_embedding_size % 2:
            raise ValueError(
                f"DiTConfig: frequency_embedding_size is {self.frequency_embedding_size}; expected an even number"
            )
        if self.mlp_hidden_size < 1:
            raise ValueError(
                f"DiTConfig: mlp_ratio is {self.mlp_ratio}; expected at least 1 / hidden_size={self.hidden_size}"
            )

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> DiTConfig:
        """Preset such as "DiT-XL/2" (families S, B, L, XL; patches 2, 4, 8), with any field overridden."""
        family, _, patch = name.removeprefix("DiT-").partition("/")
        if name[:4] != "DiT-" or family not in _PRESETS or patch not in map(str, _PRESET_PATCHES):
            known = ", ".join(f"DiT-{f}/{p}" for f in _PRESETS for p in _PRESET_PATCHES)
            raise ValueError(f"DiTConfig.from_name: name is {name!r}; expected one of {known}")
        hidden_size, depth, num_heads = _PRESETS[family]
        sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": int(patch)}
        return cls(**{**sizes, **overrides})

    @property
    def input_hw(self) -> tuple[int, int]:
        """Latent (height, width)."""
        height, width = (self.input_size,) * 2 if isinstance(self.input_size, int) else self.input_size
        return height, width

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Token grid (rows, columns)."""
        height, width = self.input_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """L, the tokens of one segment."""
        return math.prod(self.grid_hw)

    @property
    def out_channels(self) -> int:
        """Channels a final layer emits: epsilon, and sigma when `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)
