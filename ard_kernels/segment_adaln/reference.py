"""The slow oracle of the adaLN family: fp64, rows spread over tokens, for tests and benchmarks only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.segment_adaln.spec import row_of_token


def spread(rows: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """(B, T, C) fp64: each token's row, of (B, S, C) or (B, S, 1, C)."""
    rows_BSC = rows.double().flatten(1, -2)
    return rows_BSC[:, row_of_token(lengths, tokens, rows.device)]


def adaln_modulate(
    x_BTC: Tensor, shift: Tensor | None, scale: Tensor | None, lengths: Sequence[int], eps: float = NORM_EPS,
    norm: str = "layer", weight: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = N(x) * (1 + scale) + shift, with the biased variance of LayerNorm."""
    x, T = x_BTC.double(), x_BTC.shape[1]
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    if scale is not None:
        y = y * (1 + spread(scale, lengths, T))
    return y if shift is None else y + spread(shift, lengths, T)


def gate_residual(x_BTC: Tensor, branch_BTC: Tensor, gate: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """h = x + gate * branch."""
    branch = branch_BTC.double()
    return x_BTC.double() + (branch if gate is None else spread(gate, lengths, x_BTC.shape[1]) * branch)


def gate_residual_adaln(
    x_BTC: Tensor, branch_BTC: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int], eps: float = NORM_EPS, norm: str = "layer", weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = x + gate * branch, y = N(h) * (1 + scale) + shift."""
    h_BTC = gate_residual(x_BTC, branch_BTC, gate, lengths)
    return h_BTC, adaln_modulate(h_BTC, shift, scale, lengths, eps, norm, weight, bias)
