"""Attention over segments, said once: which tokens see which, validation. Pure index algebra, no data movement.

A mask (`mask.py`) says which query segment sees which key segment. Block-causal: a query in segment s sees the keys of
segments `max(0, s - window + 1) .. s` (window None: `0 .. s`) and of the first `sink` segments. The masks of the ARD
paper (arXiv 2504.11295, Fig. 4):

    M1 block-diagonal   window=1            M3 own + noise segment   window=1, sink=1
    M2 sliding window   window=2            M4 block-causal          window=None

`lengths` is the list of `ard_kernels.common.segments`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.compiler import is_compiling

from ard_kernels.block_causal_attention.mask import Run, SegmentMask, causal_code, mask_of
from ard_kernels.common.arguments import check_int, check_tensor, described, is_int
from ard_kernels.common.dtypes import DTYPES, EXPECTED, accumulation_dtype
from ard_kernels.common.segments import segment_count, segment_offsets

MAX_HEAD_DIM = 256
MOST_SEGMENTS = 1 << 31  # a window or sink beyond is no other mask


class Segments(NamedTuple):
    """A mask and the segments it stands over, as ops and backends pass them on; hashable."""

    mask: str  # SegmentMask.code, or causal_code
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]


class Visibility(NamedTuple):
    """`Segments` in tokens."""

    q_offsets: list[int]  # (S_q + 1,)
    k_offsets: list[int]  # (S_k + 1,)
    keys: list[list[Run]]  # per query segment, the token ranges it sees, in order and apart
    queries: list[list[Run]]  # per key segment, those of the queries that see it
    pairs: int  # (query, key) token pairs that the mask keeps


@lru_cache(maxsize=1024)
def visibility(segments: Segments, q_tokens: int, k_tokens: int) -> Visibility:
    """`segments` in tokens; made once per shape."""
    q_offsets, k_offsets = (
        segment_offsets(lengths, tokens)
        for lengths, tokens in ((segments.q_lengths, q_tokens), (segments.k_lengths, k_tokens))
    )
    mask = mask_of(segments.mask, len(q_offsets) - 1)
    keys = _tokens(mask, k_offsets)
    queries = _tokens(mask.transposed(), q_offsets)
    return Visibility(q_offsets, k_offsets, keys, queries, mask.pairs(q_offsets, k_offsets))


def _tokens(mask: SegmentMask, offsets: list[int]) -> list[list[Run]]:
    return [[(offsets[first], offsets[stop]) for first, stop in runs] for runs in mask.runs]


def block_causal(lengths: Sequence[int], window: int | None, sink: int) -> Segments:
    """Segments of which each sees earlier ones, by the op's `lengths`."""
    return Segments(causal_code(window, sink), tuple(lengths), tuple(lengths))


def useful_pairs(lengths: Sequence[int], tokens: int, window: int | None, sink: int) -> int:
    """Number of (query, key) pairs that a block-causal mask keeps."""
    return visibility(block_causal(lengths, window, sink), tokens, tokens).pairs


def dense_mask(
    lengths: Sequence[int], tokens: int, window: int | None, sink: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(T, T) bool of a block-causal mask, True where query (row) sees key (column)."""
    offsets = segment_offsets(lengths, tokens)
    each = [stop - start for start, stop in pairwise(offsets)]
    return mask_of(causal_code(window, sink), len(each)).dense(each, device=device)


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


def warn_of_tokens(op: str, window: int, lengths: Sequence[int], tokens: int) -> None:
    """Tell who passes a window in tokens: it is larger than the number of segments, and so no window at all."""
    if is_compiling() or window < lengths[0] or lengths[0] < 8:
        return
    segments = segment_count(lengths, tokens)
    if window > segments and window % lengths[0] == 0:
        warnings.warn(
            f"{op}: window={window} of {segments} segments sees all of them. A window counts segments, the own one "
            f"included; {window} tokens are window={window // lengths[0]}",
            stacklevel=3,
        )


def check_code(op: str, code: str, q_lengths: Sequence[int], k_lengths: Sequence[int], tokens: tuple[int, int]) -> None:
    """ValueError unless `code`, as ops take a mask, is one over as many query and key segments as there are."""
    counts = segment_count(q_lengths, tokens[0]), segment_count(k_lengths, tokens[1])
    if code.startswith("causal ") and counts[0] != counts[1]:
        raise ValueError(f"{op}: k has {counts[1]} segments; expected q's {counts[0]}")
    try:
        mask = mask_of(code, counts[0])
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    check_mask(op, mask, *counts)


def check_mask(op: str, mask: SegmentMask, query_segments: int, key_segments: int) -> None:
    """ValueError unless the mask has so many query and key segments."""
    for name, segments, expected in (
        ("q", query_segments, mask.query_segments),
        ("k", key_segments, mask.key_segments),
    ):
        if segments != expected:
            raise ValueError(f"{op}: {name} has {segments} segments; expected the mask's {expected}")


def check_qkv(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str,
    grouped: bool = True, own_tokens: bool = False,
) -> None:  # fmt: skip
    """ValueError unless q, k, v are 4-D and alike in dtype and device, head dim a multiple of 8 up to 256.

    k and v have q's shape, but for heads that divide q's (grouped) and another number of tokens (own_tokens).
    """
    if layout not in ("bhtd", "bthd"):
        raise ValueError(f"{op}: layout is {described(layout)}; expected 'bhtd' or 'bthd'")
    check_tensor(op, "q", q)
    if q.dim() != 4:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected 4 dims ({', '.join(layout.upper())})")
    check_tensor(op, "k", k)
    expected = list(q.shape)
    if k.dim() == 4:
        head_dim, token_dim = layout.index("h"), layout.index("t")
        heads, kv_heads = q.shape[head_dim], k.shape[head_dim]
        if grouped and (heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)):
            expected[head_dim] = kv_heads
        if own_tokens:
            expected[token_dim] = k.shape[token_dim]
    if k.dim() != 4 or list(k.shape) != expected:
        free = " (heads may be fewer that divide q's)" * grouped + " (with tokens of its own)" * own_tokens
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}; expected q's {tuple(q.shape)}{free}")
    _check_alike(op, "q", q, {"k": k})
    check_tensor(op, "v", v)
    if v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; expected k's {tuple(k.shape)}")
    _check_alike(op, "q", q, {"v": v})
    check_dtype_and_head_dim(op, "q", q.dtype, q.shape[-1])


def check_like(op: str, name: str, x: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
    """ValueError unless the others have the shape, dtype and device of x, which is called `name`."""
    for other_name, other in others.items():
        check_tensor(op, other_name, other)
        if other.shape != x.shape:
            raise ValueError(f"{op}: {other_name} has shape {tuple(other.shape)}; expected {name}'s {tuple(x.shape)}")
    _check_alike(op, name, x, others)


def _check_alike(op: str, name: str, x: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
    for other_name, other in others.items():
        if other.dtype != x.dtype:
            raise ValueError(f"{op}: {other_name} has dtype {other.dtype}; expected {name}'s {x.dtype}")
        if other.device != x.device:
            raise ValueError(f"{op}: {other_name} is on {other.device}; expected {name}'s {x.device}")


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
    check_like_lse(op, "lse", lse, q)
    if not lse.is_contiguous():
        raise ValueError(f"{op}: lse has strides {lse.stride()}; expected contiguous memory")


def check_like_lse(op: str, name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """ValueError unless x has a number for each row of q (B, H, T, D), in any memory order, as lse's gradient."""
    check_tensor(op, name, x)
    dtype = accumulation_dtype(q.dtype)
    if x.shape != q.shape[:3] or x.dtype != dtype or x.device != q.device:
        raise ValueError(f"{op}: {name} is {described(x)}; expected {dtype} of shape {tuple(q.shape[:3])}")
