"""The adaLN family, said once: formulas, row addressing, validation.

    h = x + gate * branch          gate_residual, gate_residual_adaln; h = x for adaln_modulate
    y = N(h) * (1 + scale) + shift adaln_modulate, gate_residual_adaln
    N(h) = n * weight + bias,      n = (h - mean) / sqrt(var + eps) for "layer", h / sqrt(mean(h^2) + eps) for "rms"

x (B, T, C). Rows (shift, scale, gate) are (B, S, C), one per segment, or (B, T, C), one per token: the latter is the
same thing with segments of one token. weight and bias are (C,). Absent ones are None: gate 1, shift 0, scale 0, weight
1, bias 0.

In the backward everything that is not a tensor of tokens follows from two sums over the tokens of a segment:

    shifts = sum dy          dshift = shifts                             dbias = sum_S (1 + scale) * shifts
    scales = sum dy * n      dscale = weight * scales + bias * shifts    dweight = sum_S (1 + scale) * scales
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ard_kernels.common.arguments import check_number, check_tensor, described
from ard_kernels.common.dtypes import DTYPES, EXPECTED, accumulation_dtype
from ard_kernels.common.segments import check_lengths, check_segment_length, segment_offsets

NORMS = ("layer", "rms")


def check_activation(op: str, name: str, x: Tensor, like: Tensor | None = None) -> None:
    """ValueError unless x is (B, T, C) of a supported dtype and, given `like`, has its shape and device."""
    check_tensor(op, name, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected 3 dims (B, T, C)")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected x's {tuple(like.shape)}")
    _check_dtype(op, name, x, x if like is None else like)


def _check_dtype(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """ValueError unless x has a supported dtype and may stand beside `like`, the op's x."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; expected {EXPECTED}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}; expected x's {like.device}")
    if x.dtype == torch.float64 != like.dtype:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; expected it with float64 x only, and x is {like.dtype}")


def check_rows(op: str, x: Tensor, rows: dict[str, Tensor | None], segment_length: int | Sequence[int]) -> list[int]:
    """Validate the rows against x (B, T, C); the op's `lengths`, which is [1] for rows per token."""
    B, T, C = x.shape
    lengths = check_segment_length(op, segment_length, "x", T)
    segments = T // lengths[0] if len(lengths) == 1 else len(lengths)
    first_name, first = "", None
    for name, row in rows.items():
        if row is None:
            continue
        check_tensor(op, name, row)
        first_name, first = (name, row) if first is None else (first_name, first)
        shape = row.shape
        if shape != (B, segments, C) and shape != (B, T, C) and shape != (B, segments, 1, C):
            raise ValueError(
                f"{op}: {name} has shape {tuple(shape)}; expected {(B, segments, C)} (per segment, also as "
                f"{(B, segments, 1, C)}) or {(B, T, C)} (per token)"
            )
        if shape != first.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}; expected {first_name}'s {tuple(first.shape)}")
        if row.dtype != first.dtype:
            raise ValueError(f"{op}: {name} has dtype {row.dtype}; expected a float dtype equal to {first_name}'s")
        _check_dtype(op, name, row, x)
    return lengths if first is None or first.shape[1] == segments else [1]


def check_norm(op: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None) -> None:
    """ValueError unless norm is known and weight and bias are (C,) and fit it."""
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {described(norm)}; expected 'layer' or 'rms'")
    if bias is not None and norm == "rms":
        raise ValueError(f"{op}: bias is given with norm='rms'; expected None, an RMSNorm has no bias")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        check_tensor(op, name, parameter)
        if tuple(parameter.shape) != (x.shape[-1],):
            raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}; expected {(x.shape[-1],)}")
        _check_dtype(op, name, parameter, x)


def check_eps(op: str, eps: float) -> float:
    """eps as a float, or a ValueError unless it is positive."""
    value = check_number(op, "eps", eps, "a positive number")
    if not value > 0:
        raise ValueError(f"{op}: eps is {eps}; expected a positive number")
    return value


def check_raw(
    op: str, tokens: dict[str, Tensor | None], rows: dict[str, Tensor | None], norm: str | None, weight: Tensor | None,
    bias: Tensor | None, lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """ValueError unless what `torch.ops.ard` was called with is what a public function would pass on.

    tokens: (B, T, C) tensors, the first of them returned; rows: those per segment of `lengths`; None: absent.
    """
    given = {name: x for name, x in tokens.items() if x is not None}
    if not given:
        raise ValueError(f"{op}: {' and '.join(tokens)} are None; expected a tensor")
    first = next(iter(given.values()))
    for name, x in given.items():
        check_activation(op, name, x, like=first)
    check_lengths(op, lengths, first.shape[1])
    if check_rows(op, first, rows, lengths[0] if len(lengths) == 1 else lengths) != list(lengths):
        raise ValueError(f"{op}: lengths is {list(lengths)}; expected [1] for rows per token")
    if norm is not None:
        check_norm(op, first, norm, weight, bias)
    for name, tensor in (given | rows | {"weight": weight, "bias": bias}).items():
        if tensor is None:
            continue
        if tensor.dim() > 3:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected 3 dims")
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1 and tensor.numel():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; expected a contiguous last dim")
    return first


def check_statistics(op: str, x_BTC: Tensor, **statistics: Tensor | None) -> None:
    """ValueError unless the statistics are (B, T), contiguous, of the accumulation dtype."""
    dtype = accumulation_dtype(x_BTC.dtype)
    for name, x in statistics.items():
        if (
            x is None
            or x.shape != x_BTC.shape[:2]
            or x.dtype != dtype
            or x.device != x_BTC.device
            or not x.is_contiguous()
        ):
            raise ValueError(f"{op}: {name} is {described(x)}; expected contiguous {dtype} {tuple(x_BTC.shape[:2])}")


def row_of_token(lengths: Sequence[int], tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """(T,) int64: the row that token t uses."""
    offsets = torch.tensor(segment_offsets(lengths, tokens)[1:], device=device)
    return torch.bucketize(torch.arange(tokens, device=device), offsets, right=True)
