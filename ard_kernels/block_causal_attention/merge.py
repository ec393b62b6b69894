"""Partial attention results, of the same queries over different keys, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ard_kernels.common.arguments import check_tensor, described
from ard_kernels.common.dtypes import accumulation_dtype


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], *, layout: str = "bhtd") -> tuple[Tensor, Tensor]:
    """The attention over all keys, of what `segment_attention(..., return_lse=True)` gave for parts of them.

        lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

    PyTorch ops, differentiable in everything; in fp32, rounded once. Each part has been rounded to the outputs' dtype,
    so in half precision one call over all keys is nearer to the truth.

    Args:
        outs: one or more (B, H, T, D), or (B, T, H, D) with layout "bthd"; alike.
        lses: as many (B, H, T), fp32 (fp64 with fp64); -inf where a part's query saw nothing.

    Returns:
        (out, lse), like one of each. A query that sees nothing in any part: 0 and -inf.

    Raises:
        ValueError: no parts, or parts that do not fit together.

    Source: FlashAttention, arXiv 2205.14135, Sec. 3.1 (the softmax of concatenated keys).
    """
    op = "merge_attention"
    _check(op, outs, lses, layout)
    dtype = accumulation_dtype(outs[0].dtype)
    each_lse = torch.stack([lse.to(dtype) for lse in lses])
    highest = each_lse.detach().amax(0)
    highest = highest.masked_fill(highest == float("-inf"), 0)  # -inf - -inf is not a number
    weights = (each_lse - highest).exp()
    total = weights.sum(0)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    shares = weights / total
    if layout == "bthd":
        shares = shares.transpose(-1, -2)
    # What a part has for a query that saw nothing does not matter: 0 times it would, were it not a number.
    parts = [out.masked_fill((share == 0)[..., None], 0).to(dtype) for share, out in zip(shares, outs, strict=True)]
    out = sum(share[..., None] * part for share, part in zip(shares, parts, strict=True))
    return out.to(outs[0].dtype), (highest + total.log()).masked_fill(blind, float("-inf"))


def _check(op: str, outs: Sequence[Tensor], lses: Sequence[Tensor], layout: str) -> None:
    if layout not in ("bhtd", "bthd"):
        raise ValueError(f"{op}: layout is {described(layout)}; expected 'bhtd' or 'bthd'")
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError(f"{op}: {name} is {described(parts)}; expected a list of tensors")
    if len(outs) != len(lses):
        raise ValueError(f"{op}: lses has {len(lses)} tensors; expected one for each of {len(outs)} outs")
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, part in enumerate(parts):
            check_tensor(op, f"{name}[{i}]", part)
    first = outs[0]
    if first.dim() != 4:
        raise ValueError(f"{op}: outs[0] has shape {tuple(first.shape)}; expected 4 dims ({', '.join(layout.upper())})")
    rows = tuple(first.shape[:3]) if layout == "bhtd" else (first.shape[0], first.shape[2], first.shape[1])
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != first.shape or out.dtype != first.dtype or out.device != first.device:
            raise ValueError(f"{op}: outs[{i}] is {described(out)}; expected it like outs[0], {described(first)}")
        if tuple(lse.shape) != rows or not lse.is_floating_point() or lse.device != first.device:
            raise ValueError(f"{op}: lses[{i}] is {described(lse)}; expected floats of shape {rows} on {first.device}")
