"""Block-causal attention, said once: segments, who sees whom, validation. Pure index algebra, no data movement.

A query in segment s sees the keys of segments `max(0, s - window + 1) .. s` (window None: `0 .. s`) and of the
first `sink` segments. The masks of the ARD paper (arXiv 2504.11295, Fig. 4):

    M1 block-diagonal   window=1            M3 own + noise segment   window=1, sink=1
    M2 sliding window   window=2            M4 block-causal          window=None

`lengths` is the list of `ard_kernels.segments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.segments import segment_offsets

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


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


def dense_mask(
    lengths: Sequence[int], tokens: int, window: int | None, sink: int, device: torch.device | None = None
) -> torch.Tensor:
    """(T, T) bool, True where query (row) sees key (column). The mask predicate itself, written token by token."""
    offsets = torch.tensor(segment_offsets(lengths, tokens)[1:], device=device)
    segment_T = torch.bucketize(torch.arange(tokens, device=device), offsets, right=True)
    query_T1, key_1T = segment_T[:, None], segment_T[None, :]
    in_window = key_1T <= query_T1
    if window is not None:
        in_window &= key_1T > query_T1 - window
    return in_window | ((key_1T < sink) & (key_1T <= query_T1))


def check_window(op: str, window: int | None, sink: int) -> None:
    """ValueError unless window is None or >= 1 and sink >= 0 (both in segments)."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window is {window!r}; expected None or an int >= 1 (segments)")
    if isinstance(sink, bool) or not isinstance(sink, int) or sink < 0:
        raise ValueError(f"{op}: sink is {sink!r}; expected an int >= 0 (segments)")


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """ValueError unless q, k, v are alike: 4-D, one shape, dtype and device, head dim a multiple of 8 up to 256."""
    if layout not in ("bhtd", "bthd"):
        raise ValueError(f"{op}: layout is {layout!r}; expected 'bhtd' or 'bthd'")
    if q.dim() != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected 4 dims ({', '.join(layout.upper())})")
    for name, other in (("k", k), ("v", v)):
        if other.shape != q.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(other.shape)}; expected q's {tuple(q.shape)}")
        if other.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {other.dtype}; expected q's {q.dtype}")
        if other.device != q.device:
            raise ValueError(f"{op}: {name} is on {other.device}; expected q's {q.device}")
    _check_dtype_and_head_dim(op, "q", q)


def check_packed(op: str, qkv: torch.Tensor) -> None:
    """ValueError unless qkv is (B, T, 3, H, D) of a supported dtype, D a multiple of 8 up to 256."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; expected 5 dims (B, T, 3, H, D)")
    _check_dtype_and_head_dim(op, "qkv", qkv)


def _check_dtype_and_head_dim(op: str, name: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64")
    if x.shape[-1] % 8 != 0 or not 8 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: {name} has head dim {x.shape[-1]}; expected a multiple of 8 from 8 to {MAX_HEAD_DIM}")
