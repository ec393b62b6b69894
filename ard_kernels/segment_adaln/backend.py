"""What a backend of the adaLN family provides besides the torch backend's composition of PyTorch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """One forward and one backward serve all three ops: what a call lacks is None, inputs and results alike.

    Both write into memory that the op has allocated. Tensors have a contiguous last dim and are not empty; `lengths` is
    [1] for rows per token. mean and rstd (B, T) are fp32; a norm without a mean is an RMSNorm. Formulas: spec.py.
    """

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, h: Tensor | None, y: Tensor | None, mean: Tensor | None,
        rstd: Tensor | None, lengths: Sequence[int], eps: float,
    ) -> None:  # fmt: skip
        """h = x + gate * branch; y, mean and rstd of the modulated norm of h, or of x where there is no h."""

    def backward(
        self, grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None,
        gate: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
        rstd: Tensor | None, dx: Tensor | None, dbranch: Tensor | None, dgate: Tensor | None, dshift: Tensor | None,
        dscale: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, lengths: Sequence[int],
    ) -> None:  # fmt: skip
        """The gradients. Without a norm h is None and so is dx, which is grad_h; a branch comes with its gate only, for
        without one dbranch is dx. Of the others those that nobody wants are None."""
