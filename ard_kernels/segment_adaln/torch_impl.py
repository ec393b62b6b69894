# mypy: no-strict-optional
# (Inputs that an op lacks are None, in groups that their types do not know.)
"""The adaLN family as a composition of PyTorch ops: runs on every device; rows are broadcast, not copied per token.

All arithmetic is fp32 (fp64 for fp64 inputs). x (B, T, C) is viewed (B, S, L, C) against rows (B, S, 1, C); ragged
segments spread their rows over tokens first and sum their gradients per segment, in token order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.common.segments import segment_offsets
from ard_kernels.segment_adaln.spec import row_of_token

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # h, y, mean, rstd
# dx, dbranch, dgate, dshift, dscale
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _tile(x_BTC: Tensor, lengths: Sequence[int], acc: torch.dtype) -> Tensor:
    """(B, S, L, C) in the accumulation dtype; (B, T, 1, C) for ragged segments."""
    return x_BTC.to(acc).unflatten(1, (-1, lengths[0] if len(lengths) == 1 else 1))


def _rows(rows_BSC: Tensor, lengths: Sequence[int], tokens: int, acc: torch.dtype) -> Tensor:
    """(B, S, 1, C) against `_tile`; (B, T, 1, C) for ragged segments."""
    if len(lengths) > 1:
        rows_BSC = rows_BSC[:, row_of_token(lengths, tokens, rows_BSC.device)]
    return rows_BSC.to(acc).unsqueeze(2)


def _row_sum(terms_BSLC: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(B, S, C): sum over the tokens of each segment."""
    if len(lengths) == 1:
        return terms_BSLC.sum(2).to(dtype)
    terms_BTC, offsets = terms_BSLC.flatten(1, 2), segment_offsets(lengths, terms_BSLC.shape[1])
    return torch.stack([terms_BTC[:, a:b].sum(1) for a, b in pairwise(offsets)], 1).to(dtype)


def _layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean, rstd) over the last dim."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)


def _composed_layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_layer_norm` for derivatives of any order: gradients of native_layer_norm's tangent are wrong (torch 2.13)."""
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    return (x - mean) * rstd, mean, rstd


def composite(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int], eps: float, y_dtype: torch.dtype | None,
) -> Outputs:  # fmt: skip
    """`forward` that can be differentiated in any mode and order, but for mean and rstd."""
    h, y, mean, rstd = forward(x, branch, gate, shift, scale, lengths, eps, y_dtype, _composed_layer_norm)
    return h, y, None if mean is None else mean.detach(), None if rstd is None else rstd.detach()


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int], eps: float, y_dtype: torch.dtype | None, layer_norm: Callable = _layer_norm,
) -> Outputs:  # fmt: skip
    """(h, y, mean (B, T), rstd (B, T)); branch and gate, or shift and scale, may be None, then so is their output."""
    B, T, C = x.shape
    acc = accumulation_dtype(x.dtype)
    h = y = mean = rstd = None
    if branch is not None:
        h = torch.addcmul(_tile(x, lengths, acc), _rows(gate, lengths, T, acc), _tile(branch, lengths, acc))
        x = h = h.to(x.dtype).reshape(B, T, C)
    if shift is not None:
        normalised, mean, rstd = layer_norm(_tile(x, lengths, acc), eps)
        y = torch.addcmul(_rows(shift, lengths, T, acc), normalised, 1 + _rows(scale, lengths, T, acc))
        y, mean, rstd = y.to(y_dtype).reshape(B, T, C), mean.reshape(B, T), rstd.reshape(B, T)
    return h, y, mean, rstd


def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor | None, lengths: Sequence[int],
) -> Gradients:  # fmt: skip
    """(dx, dbranch, dgate, dshift, dscale), None where the forward had no such input (no norm: dx is grad_h, not made).

    With n = LN(h), g = dy * (1 + scale):  dx = rstd * (g - mean(g) - n * mean(g * n)) + dh,  dshift = sum dy,
    dscale = sum dy * n,  dbranch = gate * dx,  dgate = sum dx * branch.
    """
    like = h if h is not None else grad_h
    B, T, C = like.shape
    acc = accumulation_dtype(like.dtype)
    dx = None if grad_h is None else _tile(grad_h, lengths, acc)
    dbranch = dgate = dshift = dscale = None
    if grad_y is not None:
        dy = _tile(grad_y, lengths, acc)
        mean, rstd = (_tile(statistic[..., None], lengths, acc) for statistic in (mean, rstd))
        n = (_tile(h, lengths, acc) - mean) * rstd
        g = dy * (1 + _rows(scale, lengths, T, acc))
        dn = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        dx = dn if dx is None else dx + dn
        dshift, dscale = _row_sum(dy, lengths, scale.dtype), _row_sum(dy * n, lengths, scale.dtype)
    if branch is not None:
        dbranch = (dx * _rows(gate, lengths, T, acc)).to(branch.dtype).reshape(B, T, C)
        dgate = _row_sum(dx * _tile(branch, lengths, acc), lengths, gate.dtype)
    return None if h is None else dx.to(h.dtype).reshape(B, T, C), dbranch, dgate, dshift, dscale
