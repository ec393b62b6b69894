"""What a backend of qk_norm_rope provides."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ard_kernels.qk_norm_rope.spec import Rule


class Kernels(Protocol):
    """One forward and one backward of a section; both write into memory that the op has allocated.

    x, y, their gradients (B, T, H, D) have a contiguous last dim and are not empty. weight, bias and their gradients
    (D,) or (H * D,), mean, rstd (B, T, H or 1): contiguous, None where the rule lacks them. cos, sin
    (B or 1, L, H or 1, P) with a contiguous last dim, or both None.
    """

    def forward(
        self, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        mean: Tensor | None, rstd: Tensor | None, rule: Rule,
    ) -> None:  # fmt: skip
        """y, mean and rstd."""

    def backward(
        self, grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        mean: Tensor | None, rstd: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, rule: Rule,
    ) -> None:  # fmt: skip
        """dx, dweight and dbias."""
