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
# dx, dbranch, dgate, dshift, dscale, dweight, dbias
Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def _tile(x_BTC: Tensor, lengths: Sequence[int], acc: torch.dtype) -> Tensor:
    """(B, S, L, C) in the accumulation dtype; (B, T, 1, C) for ragged segments."""
    return x_BTC.to(acc).unflatten(1, (-1, lengths[0] if len(lengths) == 1 else 1))


def _rows(rows_BSC: Tensor, lengths: Sequence[int], tokens: int, acc: torch.dtype) -> Tensor:
    """(B, S, 1, C) against `_tile`; (B, T, 1, C) for ragged segments."""
    if len(lengths) > 1:
        rows_BSC = rows_BSC[:, row_of_token(lengths, tokens, rows_BSC.device)]
    return rows_BSC.to(acc).unsqueeze(2)


def _output(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """x as an output: contiguous, whatever the memory order of the inputs."""
    return (x if shape is None else x.reshape(shape)).to(dtype).contiguous()


def _row_sum(terms_BSLC: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, S, C): sum over the tokens of each segment."""
    if len(lengths) == 1:
        return terms_BSLC.sum(2)
    terms_BTC, offsets = terms_BSLC.flatten(1, 2), segment_offsets(lengths, terms_BSLC.shape[1])
    return torch.stack([terms_BTC[:, a:b].sum(1) for a, b in pairwise(offsets)], 1)


def _normalise(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(n, mean, rstd) over the last dim; an RMSNorm has no mean."""
    if norm == "layer":
        return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, None, rstd


def _composed_normalise(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """`_normalise` for derivatives of any order: gradients of native_layer_norm's tangent are wrong (torch 2.13)."""
    if norm == "rms":
        return _normalise(x, norm, eps)
    mean = x.mean(-1, keepdim=True)
    n, _, rstd = _normalise(x - mean, "rms", eps)
    return n, mean, rstd


def composite(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], norm: str | None, eps: float,
    y_dtype: torch.dtype, backend: str,
) -> Outputs:  # fmt: skip
    """`forward` that can be differentiated in any mode and order, but for mean and rstd; the op's arguments."""
    inputs = x, branch, gate, shift, scale, weight, bias
    h, y, mean, rstd = forward(*inputs, lengths, norm, eps, y_dtype, _composed_normalise)
    return h, y, None if mean is None else mean.detach(), None if rstd is None else rstd.detach()


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], norm: str | None, eps: float,
    y_dtype: torch.dtype, normalise: Callable = _normalise,
) -> Outputs:  # fmt: skip
    """(h, y, mean (B, T), rstd (B, T)); None without a branch, a norm, a mean."""
    B, T, C = x.shape
    acc = accumulation_dtype(x.dtype)
    h = y = mean = rstd = None
    if branch is not None:
        wide, branch = _tile(x, lengths, acc), _tile(branch, lengths, acc)
        h = wide + branch if gate is None else torch.addcmul(wide, _rows(gate, lengths, T, acc), branch)
        x = h = _output(h, x.dtype, (B, T, C))
    if norm is not None:
        y, mean, rstd = normalise(_tile(x, lengths, acc), norm, eps)
        y = _affine(y, weight, bias)
        factor, shift = _factor(scale, lengths, T, acc), None if shift is None else _rows(shift, lengths, T, acc)
        if factor is not None and shift is not None:
            y = torch.addcmul(shift, y, factor)
        elif factor is not None:
            y = y * factor
        elif shift is not None:
            y = y + shift
        y, rstd = _output(y, y_dtype, (B, T, C)), _output(rstd, acc, (B, T))
        mean = None if mean is None else _output(mean, acc, (B, T))
    return h, y, mean, rstd


def _factor(scale: Tensor | None, lengths: Sequence[int], tokens: int, acc: torch.dtype) -> Tensor | None:
    """1 + scale, as `_rows`."""
    return None if scale is None else 1 + _rows(scale, lengths, tokens, acc)


def _affine(n: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """n * weight + bias in n's dtype."""
    if weight is not None:
        n = n * weight.to(n.dtype)
    return n if bias is None else n + bias.to(n.dtype)


def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    lengths: Sequence[int], row_dtype: torch.dtype | None, wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The gradients as `Kernels.backward` gives them. With g = dy * (1 + scale) * weight:

    dx = rstd * (g - mean(g) - n * mean(g * n)) + dh (an RMSNorm: without mean(g)),  dbranch = gate * dx,
    dgate = sum dx * branch; the others as in spec.py.
    """
    like = h if h is not None else grad_h
    B, T, C = like.shape
    acc = accumulation_dtype(like.dtype)
    dx = None if grad_h is None else _tile(grad_h, lengths, acc)
    dbranch = dgate = dshift = dscale = dweight = dbias = None
    if grad_y is not None:
        dy, n, rstd = _tile(grad_y, lengths, acc), _tile(h, lengths, acc), _tile(rstd[..., None], lengths, acc)
        n = (n if mean is None else n - _tile(mean[..., None], lengths, acc)) * rstd
        factor = _factor(scale, lengths, T, acc)
        g = _affine(dy if factor is None else dy * factor, weight, None)
        centred = g if mean is None else g - g.mean(-1, keepdim=True)
        dn = rstd * (centred - n * (g * n).mean(-1, keepdim=True))
        dx = dn if dx is None else dx + dn
        dshift, dscale, dweight, dbias = _row_gradients(dy, n, scale, weight, bias, lengths, row_dtype, wanted[1:])
    if branch is not None:
        dbranch = _output(dx * _rows(gate, lengths, T, acc), branch.dtype, (B, T, C))
        if wanted[0]:
            dgate = _output(_row_sum(dx * _tile(branch, lengths, acc), lengths), gate.dtype)
    dx = None if h is None else _output(dx, h.dtype, (B, T, C))
    return dx, dbranch, dgate, dshift, dscale, dweight, dbias


def _row_gradients(
    dy: Tensor, n: Tensor, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int],
    row_dtype: torch.dtype | None, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dshift, dscale, dweight, dbias, those that are wanted, from the sums of spec.py."""
    shift_wanted, scale_wanted, weight_wanted, bias_wanted = wanted
    dshift = dscale = dweight = dbias = None
    if shift_wanted or bias_wanted or (scale_wanted and bias is not None):
        shifts = _row_sum(dy, lengths)
    if scale_wanted or weight_wanted:
        scales = _row_sum(dy * n, lengths)
    factor = 1.0 if scale is None else 1 + scale.to(dy.dtype)
    if shift_wanted:
        dshift = _output(shifts, row_dtype)
    if scale_wanted:
        dscale = _affine(scales, weight, None)
        dscale = _output(dscale if bias is None else dscale + bias.to(dy.dtype) * shifts, scale.dtype)
    if weight_wanted:
        dweight = (scales * factor).sum((0, 1)).to(weight.dtype)
    if bias_wanted:
        dbias = (shifts * factor).sum((0, 1)).to(bias.dtype)
    return dshift, dscale, dweight, dbias
