"""What a backend of gelu provides."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Tensors of one call have the same strides and no gaps, and are not empty. Results are written in place."""

    def forward(self, x: Tensor, y: Tensor) -> None:
        """y = gelu(x)."""

    def backward(self, grad: Tensor, x: Tensor, dx: Tensor) -> None:
        """dx = grad * gelu'(x)."""
