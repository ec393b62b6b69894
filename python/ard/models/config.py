"""Sizes that every family has, and the conditions that steer its models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ard.common.settings import Ranged
from ard.models.convention import Convention
from ard_kernels.block_causal_attention.spec import MAX_HEAD_DIM
from ard_kernels.common.arguments import described

RESERVED = ("noise", "x0", "ode", "latents", "images")  # what is stored beside conditions
CONDITION_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16, "bool": torch.bool}


@dataclass(frozen=True)
class Condition:
    """A named tensor (B, *shape) that steers a model; with ``classes``, labels in [0, classes)."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "int64"
    classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.name.isidentifier() or self.name in RESERVED:
            raise ValueError(f"Condition: name is {described(self.name)}; expected a plain name, none of {RESERVED}")
        if self.classes < 0 or any(size < 1 for size in self.shape):
            raise ValueError(f"Condition: {self.name} has classes={self.classes}, shape={self.shape}; expected sizes")
        if self.dtype not in CONDITION_DTYPES:
            raise ValueError(f"Condition: dtype is {self.dtype!r}; expected one of {sorted(CONDITION_DTYPES)}")
        if self.classes and (self.dtype != "int64" or self.shape):
            raise ValueError(f"Condition: {self.name} has classes; expected int64 of shape (), got {self}")

    def __str__(self) -> str:
        return f"{self.name} of {self.classes} classes" if self.classes else f"{self.name} {self.shape} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return CONDITION_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def check(self, tensor: Tensor, batch: int) -> None:
        """Raises ValueError unless ``tensor`` is (batch, *shape), and integers where they are asked for."""
        fits, got = tuple(tensor.shape) == (batch, *self.shape), tensor.dtype
        alike = got in (torch.int64, torch.int32) if self.dtype == "int64" else got == self.torch_dtype
        if not fits or not (alike or (got.is_floating_point and self.torch_dtype.is_floating_point)):
            expected = "(" + ", ".join(map(str, (batch, *self.shape))) + ("," if not self.shape else "") + ")"
            raise ValueError(
                f"{self.name}: got {tuple(tensor.shape)} {tensor.dtype}; expected {expected} of torch.{self.dtype}"
            )

    def wrong_values(self, tensor: Tensor) -> str | None:
        """What is wrong with the values: labels outside [0, classes)."""
        if not self.classes or 0 <= int(tensor.min()) <= int(tensor.max()) < self.classes:
            return None
        span = f"[{int(tensor.min())}, {int(tensor.max())}]"
        return f"{self.name} span {span}; expected within [0, {self.classes - 1}]"


def condition_tensors(conditions: Sequence[Condition], rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of so many rows of conditions, by name."""
    return {condition.name: (condition.torch_dtype, (rows, *condition.shape)) for condition in conditions}


class Conditioned:
    """For specs of what is stored with ``conditions``: their values are checked as they are read."""

    conditions: tuple[Condition, ...]

    def check_conditions(self) -> None:
        """Raises ValueError for two of one name."""
        names = [condition.name for condition in self.conditions]
        if len(set(names)) < len(names):
            raise ValueError(f"conditions: got {described(names)}; expected each name once")

    def wrong_values(self, name: str, tensor: Tensor) -> str | None:
        """See `ard.storage.shards.ShardSpec`."""
        return next((each.wrong_values(tensor) for each in self.conditions if each.name == name), None)


@dataclass(frozen=True)
class ModelConfig(Ranged):
    """Sizes of a diffusion transformer. `input_size` is the height = width of the latent, or (height, width)."""

    family: str = field(kw_only=True)
    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    frequency_embedding_size: int = 256

    RANGES: ClassVar = {
        "input_size": "[1, 4096]",
        "patch_size": "[1, 256]",
        "in_channels": "[1, 1024]",
        "hidden_size": "[1, 16384]",
        "depth": "[1, 1024]",
        "num_heads": "[1, 16384]",
        "mlp_ratio": "(0, 64]",
        "frequency_embedding_size": "[2, 16384]",
    }
    CONVENTION: ClassVar[Convention]

    def __post_init__(self) -> None:
        super().__post_init__()
        name, family = type(self).__name__, type(self).__dataclass_fields__["family"].default
        if self.family != family:
            raise ValueError(f"{name}: family is {described(self.family)}; expected {family!r}")
        if any(side % self.patch_size for side in self.input_hw):
            raise ValueError(
                f"{name}: input_size is {self.input_size}; expected multiples of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"{name}: hidden_size is {self.hidden_size}; expected a multiple of num_heads={self.num_heads}"
            )
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: hidden_size is {self.hidden_size} with num_heads={self.num_heads}, heads of width "
                f"{self.head_dim}; expected a multiple of 8 up to {MAX_HEAD_DIM}, which attention takes"
            )
        if self.frequency_embedding_size % 2:
            raise ValueError(
                f"{name}: frequency_embedding_size is {self.frequency_embedding_size}; expected an even number"
            )
        if self.mlp_hidden_size < 1:
            raise ValueError(
                f"{name}: mlp_ratio is {self.mlp_ratio}; expected at least 1 / hidden_size={self.hidden_size}"
            )

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What steers the model, in the order in which calls take the tensors."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        """Channels a final layer emits."""
        return self.in_channels

    @property
    def mlp_weights(self) -> int:
        """Weights of a block's MLP that multiply each token."""
        return 2 * self.hidden_size * self.mlp_hidden_size

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def modulation_flops(self) -> int:
        """FLOPs of one segment's modulation rows, of all blocks and of the final layer."""
        return 2 * self.hidden_size * (6 * self.hidden_size * self.depth + 2 * self.hidden_size)

    @property
    def other_flops(self) -> int:
        """FLOPs of one segment beside DiT's parts, at batch 1."""
        return 0

    @property
    def context_flops(self) -> int:
        """FLOPs of what a sample needs once, for all its segments: keys and values of text."""
        return 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a state."""
        return (self.in_channels, *self.input_hw)

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
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    def blank_conditions(self, batch: int) -> tuple[Tensor, ...]:
        """Zeros of the conditions' shapes, to count on."""
        return tuple(torch.zeros(batch, *each.shape, dtype=each.torch_dtype) for each in self.conditions)


@dataclass(frozen=True)
class ClassConfig(ModelConfig):
    """A family that is steered by a class label."""

    num_classes: int = 1000

    RANGES: ClassVar = {**ModelConfig.RANGES, "num_classes": "[1, 1000000]"}

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (Condition("labels", classes=self.num_classes),)
