"""The slow oracle of qk_norm_rope: fp64, a pair at a time, for tests and benchmarks only."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(
    x_BTHD: Tensor, kind: str, over_all: bool, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The normalised section, in fp64."""
    x = x_BTHD.double()
    rows = x.flatten(2) if over_all else x
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + eps)
    rows = rows if weight is None else rows * weight.double()
    rows = rows if bias is None else rows + bias.double()
    return rows.unflatten(2, x.shape[2:]) if over_all else rows


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """x with its pairs turned by tables (B or 1, L, H or 1, P), in fp64; token t reads row t % L."""
    x, P = x_BTHD.double(), cos.shape[-1]
    row_T = torch.arange(x.shape[1], device=x.device) % cos.shape[1]
    cos, sin = cos.double()[:, row_T], sin.double()[:, row_T]
    columns = list(x.unbind(-1))
    for i in range(P):
        a, b = (i, i + P) if half else (2 * i, 2 * i + 1)
        first, second = columns[a], columns[b]
        columns[a] = first * cos[..., i] - second * sin[..., i]
        columns[b] = second * cos[..., i] + first * sin[..., i]
    return torch.stack(columns, -1)
