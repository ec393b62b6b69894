"""What a backend of attention over segments provides besides the torch backend's composition of PyTorch ops."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ard_kernels.block_causal_attention.spec import Segments


class Kernels(Protocol):
    """Both write into memory that the op has allocated.

    q, out and their gradients are (B, H, T_q, D), k and v (B, H_kv, T_k, D) with H a multiple of H_kv: query head h
    reads key head h // (H / H_kv). All have a contiguous last dim and are not empty; out's memory is ordered
    (B, T_q, H, D); gradients may have any strides that allow 16-byte stores. lse and its gradient are (B, H, T_q),
    contiguous, fp32. A query that sees nothing has out 0, lse -inf and no gradient.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> None:
        """out = softmax(scale * q k^T + mask) v, and lse, the log-sum-exp of the scores."""

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, segments: Segments, scale: float,
    ) -> None:  # fmt: skip
        """dq, dk, dv for grad_out and grad_lse (None: 0), given the forward's inputs and results."""
