"""qk_norm_rope as a composition of PyTorch ops: runs on every device. All arithmetic is fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.qk_norm_rope.spec import Rule


def _mean(x_BTHD: Tensor, rule: Rule) -> Tensor:
    """(B, T, H or 1, 1)."""
    return x_BTHD.mean((2, 3) if rule.over_all else -1, keepdim=True)


def _parameter(parameter: Tensor, like_BTHD: Tensor, rule: Rule) -> Tensor:
    """(D,), or (H, D) of one over all heads, in like's dtype."""
    return (parameter.unflatten(0, like_BTHD.shape[2:]) if rule.over_all else parameter).to(like_BTHD.dtype)


def _rows(table: Tensor, like_BTHD: Tensor) -> Tensor:
    """(B or 1, T, H or 1, P) of a table (B or 1, L, H or 1, P), in like's dtype."""
    return table.to(like_BTHD.dtype).repeat(1, like_BTHD.shape[1] // max(table.shape[1], 1), 1, 1)


def _turn(z: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """The pairs of z turned; turned back by -sin."""
    P = cos.shape[-1]
    a, b = z[..., : 2 * P].unflatten(-1, (2, P) if half else (P, 2)).unbind(-2 if half else -1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -2 if half else -1).flatten(-2)
    return turned if z.shape[-1] == 2 * P else torch.cat([turned, z[..., 2 * P :]], -1)


def section(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y in the accumulation dtype, mean, rstd (B, T, H or 1)); can be differentiated in any mode and order."""
    z, mean, rstd = x.to(accumulation_dtype(x.dtype)), None, None
    if rule.norm != "none":
        if rule.norm == "layer":
            mean = _mean(z, rule)
            z = z - mean
        rstd = torch.rsqrt(_mean(z.square(), rule) + rule.eps)
        z = z * rstd
    if weight is not None:
        z = z * _parameter(weight, z, rule)
    if bias is not None:
        z = z + _parameter(bias, z, rule)
    if cos is not None and sin is not None:
        z = _turn(z, _rows(cos, z), _rows(sin, z), rule.half)
    return z, None if mean is None else mean.squeeze(-1), None if rstd is None else rstd.squeeze(-1)


def forward(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    made = section(x, weight, bias, cos, sin, rule)
    for out, value in zip((y, mean, rstd), made, strict=True):
        if out is not None and value is not None:
            out.copy_(value)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py. With dz = dy turned back, g = dz * weight:  dx = rstd * (g - mean(g) - n * mean(g * n)), the
    first mean with "layer" alone;  dweight = sum dz * n,  dbias = sum dz.
    """
    dz = grad_y.to(accumulation_dtype(x.dtype))
    if cos is not None and sin is not None:
        dz = _turn(dz, _rows(cos, dz), -_rows(sin, dz), rule.half)
    if rstd is None:
        dx.copy_(dz)
        return
    n = x.to(dz.dtype)
    n = (n if mean is None else n - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    summed = (0, 1) if rule.over_all else (0, 1, 2)
    if dweight is not None:
        dweight.copy_((dz * n).sum(summed).flatten())
    if dbias is not None:
        dbias.copy_(dz.sum(summed).flatten())
    g = dz if weight is None else dz * _parameter(weight, dz, rule)
    inner = g - n * _mean(g * n, rule)
    dx.copy_((inner if mean is None else inner - _mean(g, rule)) * rstd.unsqueeze(-1))
