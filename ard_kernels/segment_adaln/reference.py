"""The slow oracle of the adaLN family: fp64, rows spread over tokens, for tests and benchmarks only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.segment_adaln.spec import row_of_token


def spread(rows_BSC: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """(B, T, C) fp64: each token's row."""
    return rows_BSC.double()[:, row_of_token(lengths, tokens, rows_BSC.device)]


def adaln_modulate(
    x_BTC: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float = NORM_EPS
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, with the biased variance of LayerNorm."""
    x, T = x_BTC.double(), x_BTC.shape[1]
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normalised * (1 + spread(scale, lengths, T)) + spread(shift, lengths, T)


def gate_residual(x_BTC: Tensor, branch_BTC: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """h = x + gate * branch."""
    return x_BTC.double() + spread(gate, lengths, x_BTC.shape[1]) * branch_BTC.double()


def gate_residual_adaln(
    x_BTC: Tensor, branch_BTC: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int],
    eps: float = NORM_EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = x + gate * branch, y = LN(h) * (1 + scale) + shift."""
    h_BTC = gate_residual(x_BTC, branch_BTC, gate, lengths)
    return h_BTC, adaln_modulate(h_BTC, shift, scale, lengths, eps)
