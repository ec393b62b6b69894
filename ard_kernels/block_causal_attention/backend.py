"""What a backend of block-causal attention provides besides the torch backend's composition of PyTorch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Both write into memory that the op has allocated.

    All tensors but lse are (B, H, T, D) with a contiguous last dim, and not empty; out's memory is ordered
    (B, T, H, D); gradients may have any strides that allow 16-byte stores. lse is (B, H, T), contiguous, fp32.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        lengths: Sequence[int], window: int | None, sink: int, scale: float,
    ) -> None:  # fmt: skip
        """out = softmax(scale * q k^T + mask) v, and lse, the log-sum-exp of the scores."""

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float,
    ) -> None:  # fmt: skip
        """dq, dk, dv for grad_out, given the forward's inputs and results."""
