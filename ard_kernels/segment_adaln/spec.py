"""The adaLN family, said once: formulas, row addressing, validation.

    adaln_modulate        y = LN(x) * (1 + scale) + shift
    gate_residual_adaln   h = x + gate * branch,  y = LN(h) * (1 + scale) + shift
    gate_residual         h = x + gate * branch

x (B, T, C). Rows (shift, scale, gate) are (B, S, C), one per segment, or (B, T, C), one per token: the latter is the
same thing with segments of one token, and every backend treats it so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.common.arguments import check_number, check_tensor, described
from ard_kernels.common.dtypes import DTYPES, EXPECTED, accumulation_dtype
from ard_kernels.common.segments import check_lengths, check_segment_length, segment_offsets


def check_activation(op: str, name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """ValueError unless x is (B, T, C) of a supported dtype and, given `like`, has its shape and device."""
    check_tensor(op, name, x)
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected 3 dims (B, T, C)")
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; expected {EXPECTED}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected x's {tuple(like.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}; expected x's {like.device}")
    if like is not None and x.dtype == torch.float64 != like.dtype:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; expected it with float64 x only, and x is {like.dtype}")


def check_rows(
    op: str, x: torch.Tensor, rows: dict[str, torch.Tensor], segment_length: int | Sequence[int]
) -> list[int]:
    """Validate the rows against x (B, T, C); the op's `lengths`, which is [1] for rows per token."""
    B, T, C = x.shape
    lengths = check_segment_length(op, segment_length, "x", T)
    segments = T // lengths[0] if len(lengths) == 1 else len(lengths)
    first_name, first = next(iter(rows.items()))
    for name, row in rows.items():
        check_tensor(op, name, row)
        if tuple(row.shape) != (B, segments, C) and tuple(row.shape) != (B, T, C):
            raise ValueError(
                f"{op}: {name} has shape {tuple(row.shape)}; expected {(B, segments, C)} (per segment) "
                f"or {(B, T, C)} (per token)"
            )
        if row.shape != first.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(row.shape)}; expected {first_name}'s {tuple(first.shape)}")
        if row.dtype != first.dtype or row.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} has dtype {row.dtype}; expected a float dtype equal to {first_name}'s")
        if row.dtype == torch.float64 != x.dtype:
            raise ValueError(f"{op}: {name} has dtype {row.dtype}; expected it with float64 x only, and x is {x.dtype}")
        if row.device != x.device:
            raise ValueError(f"{op}: {name} is on {row.device}; expected x's {x.device}")
    return lengths if first.shape[1] == segments else [1]


def check_eps(op: str, eps: float) -> float:
    """eps as a float, or a ValueError unless it is positive."""
    value = check_number(op, "eps", eps, "a positive number")
    if not value > 0:
        raise ValueError(f"{op}: eps is {eps}; expected a positive number")
    return value


def check_raw(
    op: str, tokens: dict[str, torch.Tensor | None], rows: dict[str, torch.Tensor | None], lengths: Sequence[int]
) -> None:
    """ValueError unless what `torch.ops.ard` was called with is what a public function would pass on.

    tokens: (B, T, C) tensors, the first present; rows: those per segment of `lengths`; None: absent.
    """
    given = {name: x for name, x in tokens.items() if x is not None}
    first = next(iter(given.values()))
    for name, x in given.items():
        check_activation(op, name, x, like=first)
    check_lengths(op, lengths, first.shape[1])
    present = {name: row for name, row in rows.items() if row is not None}
    if check_rows(op, first, present, lengths[0] if len(lengths) == 1 else lengths) != list(lengths):
        raise ValueError(f"{op}: lengths is {list(lengths)}; expected [1] for rows per token")
    for name, x in (given | present).items():
        if x.stride(-1) != 1 and x.numel():
            raise ValueError(f"{op}: {name} has strides {x.stride()}; expected a contiguous last dim")


def check_statistics(op: str, x_BTC: torch.Tensor, **statistics: torch.Tensor) -> None:
    """ValueError unless the statistics are (B, T), contiguous, of the accumulation dtype."""
    dtype = accumulation_dtype(x_BTC.dtype)
    for name, x in statistics.items():
        if x.shape != x_BTC.shape[:2] or x.dtype != dtype or x.device != x_BTC.device or not x.is_contiguous():
            raise ValueError(f"{op}: {name} is {described(x)}; expected contiguous {dtype} {tuple(x_BTC.shape[:2])}")


def row_of_token(lengths: Sequence[int], tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """(T,) int64: the row that token t uses."""
    offsets = torch.tensor(segment_offsets(lengths, tokens)[1:], device=device)
    return torch.bucketize(torch.arange(tokens, device=device), offsets, right=True)
