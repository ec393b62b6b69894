"""Block-causal attention, said once: segments, who sees whom, validation. Pure index algebra, no data movement.

A query in segment s sees the keys of segments `max(0, s - window + 1) .. s` (window None: `0 .. s`) and of the
first `sink` segments. The masks of the ARD paper (arXiv 2504.11295, Fig. 4):

    M1 block-diagonal   window=1            M3 own + noise segment   window=1, sink=1
    M2 sliding window   window=2            M4 block-causal          window=None

`lengths` is the list of `ard_kernels.common.segments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.common.arguments import check_int, check_tensor, described, is_int
from ard_kernels.common.dtypes import DTYPES, EXPECTED, accumulation_dtype
from ard_kernels.common.segments import segment_offsets

MAX_HEAD_DIM = 256
MOST_SEGMENTS = 1 << 31  # a window or sink beyond is no other mask, but would not fit into the ops' int64


def first_window_segment(segment: int, window: int | None) -> int:
    """First segment inside the window of a query in `segment`."""
    return 0 if window is None else max(0, segment - window + 1)


def key_ranges(offsets: Sequence[int], segment: int, window: int | None, sink: int) -> list[tuple[int, int]]:
    """Token ranges [start, stop) that a query of `segment` sees: one, or sink and window when they do not touch."""
    first = first_window_segment(segment, window)
    if sink >= first:
        return [(offsets[0], offsets[segment + 1])]
    own = (offsets[first], offsets[segment + 1])
    return [(offsets[0], offsets[sink]), own] if sink else [own]


def query_range(offsets: Sequence[int], segment: int, window: int | None, sink: int) -> tuple[int, int]:
    """Token range [start, stop) of the queries that see `segment`; always contiguous, which the backward uses."""
    segments = len(offsets) - 1
    last = segments if window is None or segment < sink else min(segments, segment + window)
    return offsets[segment], offsets[last]


def useful_pairs(lengths: Sequence[int], tokens: int, window: int | None, sink: int) -> int:
    """Number of (query, key) pairs that the mask keeps."""
    offsets = segment_offsets(lengths, tokens)
    pairs = 0
    for segment in range(len(offsets) - 1):
        keys = sum(stop - start for start, stop in key_ranges(offsets, segment, window, sink))
        pairs += (offsets[segment + 1] - offsets[segment]) * keys
    return pairs


def segment_ids(lengths: Sequence[int], tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """(T,) segment of each token."""
    stops = torch.tensor(segment_offsets(lengths, tokens)[1:], device=device)
    return torch.bucketize(torch.arange(tokens, device=device), stops, right=True)


def sees(query_Q: torch.Tensor, key_K: torch.Tensor, window: int | None, sink: int) -> torch.Tensor:
    """(Q, K) bool: the mask predicate itself, on the segments of queries and keys."""
    query_Q1, key_1K = query_Q[:, None], key_K[None, :]
    in_window = key_1K <= query_Q1
    if window is not None:
        in_window &= key_1K > query_Q1 - window
    return in_window | ((key_1K < sink) & (key_1K <= query_Q1))


def dense_mask(
    lengths: Sequence[int], tokens: int, window: int | None, sink: int, device: torch.device | None = None
) -> torch.Tensor:
    """(T, T) bool, True where query (row) sees key (column)."""
    segment_T = segment_ids(lengths, tokens, device)
    return sees(segment_T, segment_T, window, sink)


def empty_output(q_BHTD: torch.Tensor) -> torch.Tensor:
    """Empty (B, H, T, D) with (B, T, H, D) memory, the layout of every output: reshaping to (B, T, C) is free."""
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))


def check_window(op: str, window: int | None, sink: int) -> tuple[int | None, int]:
    """window and sink as ints, or a ValueError unless window is None or >= 1 and sink >= 0 (both in segments)."""
    if window is not None and (not is_int(window) or window < 1):
        raise ValueError(f"{op}: window is {described(window)}; expected None or an int >= 1 (segments)")
    sink = check_int(op, "sink", sink, 0, "segments")
    return None if window is None else min(int(window), MOST_SEGMENTS), min(sink, MOST_SEGMENTS)


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """ValueError unless q, k, v are alike: 4-D, one shape, dtype and device, head dim a multiple of 8 up to 256."""
    if layout not in ("bhtd", "bthd"):
        raise ValueError(f"{op}: layout is {described(layout)}; expected 'bhtd' or 'bthd'")
    check_tensor(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected 4 dims ({', '.join(layout.upper())})")
    check_like_q(op, q, {"k": k, "v": v})
    check_dtype_and_head_dim(op, "q", q.dtype, q.shape[-1])


def check_like_q(op: str, q: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
    """ValueError unless the others have q's shape, dtype and device."""
    for name, other in others.items():
        check_tensor(op, name, other)
        if other.shape != q.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(other.shape)}; expected q's {tuple(q.shape)}")
        if other.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {other.dtype}; expected q's {q.dtype}")
        if other.device != q.device:
            raise ValueError(f"{op}: {name} is on {other.device}; expected q's {q.device}")


def check_packed(op: str, qkv: torch.Tensor) -> None:
    """ValueError unless qkv is (B, T, 3, H, D) of a supported dtype, D a multiple of 8 up to 256."""
    check_tensor(op, "qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected 5 dims (B, T, 3, H, D)")
    check_dtype_and_head_dim(op, "qkv", qkv.dtype, qkv.shape[-1])


def check_dtype_and_head_dim(op: str, name: str, dtype: torch.dtype, head_dim: int) -> None:
    """ValueError unless attention takes the dtype and the head dim."""
    if dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {described(dtype)}; expected {EXPECTED}")
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: {name} has head dim {head_dim}; expected a multiple of 8 from 8 to {MAX_HEAD_DIM}")


def rows_apart(x: torch.Tensor, token_dim: int) -> bool:
    """Whether every token's D elements are contiguous and no other token's: matrix kernels read such memory in place.

    Windows that overlap (`unfold`) and tokens that are one row (`expand`) are not so. Nor may heads or batches be one
    element apart: PyTorch's CPU kernel makes its output like q, and then leaves parts of it unwritten (torch 2.13).
    """
    strides, shape = x.stride(), x.shape
    apart = strides[-1] == 1 and (strides[token_dim] >= shape[-1] or shape[token_dim] <= 1)
    if apart and 1 in strides[:-1]:
        apart = all(n <= 1 or step != 1 for n, step in zip(shape[:-1], strides[:-1], strict=True))
    return apart or x.numel() == 0


def check_rows_apart(op: str, tensors: dict[str, torch.Tensor], token_dim: int = 2) -> None:
    """ValueError unless kernels can read the tensors in place: for what comes without the public functions' copies."""
    for name, x in tensors.items():
        if not rows_apart(x, token_dim):
            raise ValueError(
                f"{op}: {name} has strides {x.stride()}; expected a contiguous last dim and tokens that do not overlap"
            )


def check_lse(op: str, lse: torch.Tensor, q: torch.Tensor) -> None:
    """ValueError unless lse is what the forward returns for q (B, H, T, D)."""
    check_tensor(op, "lse", lse)
    dtype = accumulation_dtype(q.dtype)
    if lse.shape != q.shape[:3] or lse.dtype != dtype or lse.device != q.device or not lse.is_contiguous():
        raise ValueError(f"{op}: lse is {described(lse)}; expected contiguous {dtype} of shape {tuple(q.shape[:3])}")
