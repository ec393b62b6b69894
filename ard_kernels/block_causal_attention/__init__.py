"""Attention over segments: each token sees whole segments. Block-causal masks (ARD, Fig. 4), and any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch

from ard_kernels.block_causal_attention import spec
from ard_kernels.block_causal_attention.cpu import measured_slower
from ard_kernels.block_causal_attention.mask import SegmentMask, causal_code
from ard_kernels.block_causal_attention.merge import merge_attention
from ard_kernels.block_causal_attention.op import NAMES, forward_op, packed_op
from ard_kernels.block_causal_attention.spec import rows_apart
from ard_kernels.block_causal_attention.trials import UNIT
from ard_kernels.common.arguments import check_scale, described
from ard_kernels.common.autocast import cast_to_autocast, dtype_in_autocast
from ard_kernels.common.backends import choose
from ard_kernels.common.kinds import once_per_kind
from ard_kernels.common.segments import check_segment_length
from ard_kernels.common.self_check import register_trials

register_trials(UNIT, *NAMES)

__all__ = [
    "SegmentMask",
    "block_causal_attention",
    "block_causal_attention_packed",
    "merge_attention",
    "segment_attention",
    "segment_attention_packed",
]


class _Plan(NamedTuple):
    """What is settled for all calls of a kind."""

    code: str  # the mask, as ops take it
    q_lengths: list[int]
    k_lengths: list[int]
    scale: float
    backend: str
    apart: bool  # all tensors can be read in place


def _planned(
    op: str, tensors: Sequence[torch.Tensor], token_dim: int, code: str, q_lengths: list[int], k_lengths: list[int],
    scale: float | None, backend: str | None, request: str | None,
) -> _Plan:  # fmt: skip
    x = tensors[0]
    D, dtype = x.shape[-1], dtype_in_autocast(x)
    scale = check_scale(op, scale, D)
    slow = measured_slower(tensors, dtype, q_lengths)
    chosen = choose(op.removesuffix("_packed"), backend, request, x.device, dtype, D, slow)
    return _Plan(code, q_lengths, k_lengths, scale, chosen, all([rows_apart(x, token_dim) for x in tensors]))


@overload
def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SegmentMask, *, segment_length: int | Sequence[int],
    key_segment_length: int | Sequence[int] | None = ..., scale: float | None = ..., layout: str = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SegmentMask, *, segment_length: int | Sequence[int],
    key_segment_length: int | Sequence[int] | None = ..., scale: float | None = ..., layout: str = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SegmentMask,
    *,
    segment_length: int | Sequence[int],
    key_segment_length: int | Sequence[int] | None = None,
    scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T + mask) V, where `mask` says which query segment sees which key segment.

    Args:
        q: (B, H, T_q, D), or (B, T_q, H, D) with layout "bthd"; fp32, bf16 or fp16 (fp64 on the torch backend), D a
            multiple of 8 up to 256.
        k, v: (B, H_kv, T_k, D), like q; H a multiple of H_kv. Query head h reads key head h // (H / H_kv): grouped
            queries, with H_kv = 1 one head for all. Any strides with a contiguous last dim are read in place; tokens
            that overlap in memory are copied first.
        mask: S_q x S_k, see `SegmentMask`.
        segment_length: tokens per query segment L (T_q = S_q * L), or the S_q lengths of ragged segments.
        key_segment_length: the same of the S_k key segments; default: segment_length.
        scale: softmax scale, a number; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of each query's scores, (B, H, T_q) fp32, differentiable: what
            `merge_attention` joins partial results by.
        backend: None chooses; see `ard_kernels.backends()`.

    Returns:
        out, like q in shape, layout and dtype, its memory ordered (B, T, H, D); with return_lse (out, lse).
        Accumulation is fp32. A query that sees nothing: out 0, lse -inf, no gradient. Under autocast q, k, v are cast
        to its dtype first, as scaled_dot_product_attention does. A NaN or infinity reaches the queries that see it and
        no others; on GPU backends also queries whose tile holds its segment (a product with a zero weight). Backend cpu
        takes numbers below 2^-126 for 0, in every thread: of values or gradients of 1e-36 two digits are left.

    Raises:
        ValueError: a shape, dtype, device, length, mask or backend outside this contract.
    """
    if not isinstance(mask, SegmentMask):
        raise ValueError(f"segment_attention: mask is {described(mask)}; expected an ard_kernels.SegmentMask")
    settings = mask.code, segment_length, key_segment_length, scale, layout, backend
    plan = once_per_kind(_plan_segment_attention, (q, k, v), *settings)
    return _attend(q, k, v, plan, layout, return_lse)


def _plan_segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, code: str, segment_length: int | Sequence[int],
    key_segment_length: int | Sequence[int] | None, scale: float | None, layout: str, backend: str | None,
    request: str | None,
) -> _Plan:  # fmt: skip
    op = "segment_attention"
    spec.check_qkv(op, q, k, v, layout, own_tokens=True)
    token_dim = layout.index("t")
    tokens, k_tokens = q.shape[token_dim], k.shape[token_dim]
    q_lengths = check_segment_length(op, segment_length, "q", tokens, (token_dim, q.shape, layout))
    name = "segment_length" if key_segment_length is None else "key_segment_length"
    key_segment_length = segment_length if key_segment_length is None else key_segment_length
    k_lengths = check_segment_length(op, key_segment_length, "k", k_tokens, (token_dim, k.shape, layout), name)
    spec.check_code(op, code, q_lengths, k_lengths, (tokens, k_tokens))
    return _planned(op, (q, k, v), token_dim, code, q_lengths, k_lengths, scale, backend, request)


@overload
def block_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segment_length: int | Sequence[int],
    window: int | None = ..., sink: int = ..., scale: float | None = ..., layout: str = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def block_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segment_length: int | Sequence[int],
    window: int | None = ..., sink: int = ..., scale: float | None = ..., layout: str = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def block_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segment_length: int | Sequence[int],
    window: int | None = None,
    sink: int = 0,
    scale: float | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`segment_attention` where a query of segment s sees segments s-window+1 .. s and the first `sink`.

    Args:
        q, k, v: as in `segment_attention`, with the same T.
        segment_length: tokens per segment L (T = S * L), or the S lengths of ragged segments.
        window: *segments* (not tokens, not frames) a query sees, its own included and the sink not; None sees all
            earlier ones, and so does any window >= S. `window=1` is block-diagonal.
        sink: the first `sink` segments are seen by every later query.
        scale, layout, return_lse, backend: as in `segment_attention`.

    Returns:
        As `segment_attention`.

    Raises:
        ValueError: a shape, dtype, device, segment, window, sink or backend outside this contract.

    Source: ARD, arXiv 2504.11295, Sec. 3 and Fig. 4 (masks M1 window=1, M2 window=2, M3 window=1 sink=1, M4 None).
    """
    plan = once_per_kind(_plan_block_causal, (q, k, v), segment_length, window, sink, scale, layout, backend)
    if window is not None:
        spec.warn_of_tokens("block_causal_attention", window, plan.q_lengths, q.shape[layout.index("t")])
    return _attend(q, k, v, plan, layout, return_lse)


def _plan_block_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_length: int | Sequence[int], window: int | None,
    sink: int, scale: float | None, layout: str, backend: str | None, request: str | None,
) -> _Plan:  # fmt: skip
    op = "block_causal_attention"
    spec.check_qkv(op, q, k, v, layout)
    token_dim = layout.index("t")
    lengths = check_segment_length(op, segment_length, "q", q.shape[token_dim], (token_dim, q.shape, layout))
    code = causal_code(*spec.check_window(op, window, sink))
    return _planned(op, (q, k, v), token_dim, code, lengths, lengths, scale, backend, request)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, layout: str, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The unpacked forms behind their checks."""
    q, k, v = cast_to_autocast(q, k, v)
    if not plan.apart:
        q, k, v = (x if rows_apart(x, layout.index("t")) else x.contiguous() for x in (q, k, v))
    if layout == "bthd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = forward_op(q, k, v, plan.code, plan.q_lengths, plan.k_lengths, plan.scale, plan.backend)
    if layout == "bthd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


@overload
def segment_attention_packed(
    qkv: torch.Tensor, mask: SegmentMask, *, segment_length: int | Sequence[int], scale: float | None = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def segment_attention_packed(
    qkv: torch.Tensor, mask: SegmentMask, *, segment_length: int | Sequence[int], scale: float | None = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def segment_attention_packed(
    qkv: torch.Tensor,
    mask: SegmentMask,
    *,
    segment_length: int | Sequence[int],
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`segment_attention` of one packed projection, whose gradient comes back packed: no copy joins dq, dk, dv.

    Args:
        qkv: (B, T, 3, H, D), any strides with a contiguous last dim.
        mask: S x S.
        segment_length, scale, return_lse, backend: as in `segment_attention`.

    Returns:
        out, (B, T, H, D) contiguous; with return_lse (out, lse), lse (B, H, T) fp32.

    Raises:
        ValueError: as `segment_attention`.
    """
    if not isinstance(mask, SegmentMask):
        raise ValueError(f"segment_attention_packed: mask is {described(mask)}; expected an ard_kernels.SegmentMask")
    plan = once_per_kind(_plan_segment_packed, (qkv,), mask.code, segment_length, scale, backend)
    return _attend_packed(qkv, plan, return_lse)


def _plan_segment_packed(
    qkv: torch.Tensor, code: str, segment_length: int | Sequence[int], scale: float | None, backend: str | None,
    request: str | None,
) -> _Plan:  # fmt: skip
    op = "segment_attention_packed"
    spec.check_packed(op, qkv)
    lengths = check_segment_length(op, segment_length, "qkv", qkv.shape[1], (1, qkv.shape))
    spec.check_code(op, code, lengths, lengths, (qkv.shape[1], qkv.shape[1]))
    return _planned(op, (qkv,), 1, code, lengths, lengths, scale, backend, request)


@overload
def block_causal_attention_packed(
    qkv: torch.Tensor, *, segment_length: int | Sequence[int], window: int | None = ..., sink: int = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., backend: str | None = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def block_causal_attention_packed(
    qkv: torch.Tensor, *, segment_length: int | Sequence[int], window: int | None = ..., sink: int = ...,
    scale: float | None = ..., return_lse: Literal[True], backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def block_causal_attention_packed(
    qkv: torch.Tensor,
    *,
    segment_length: int | Sequence[int],
    window: int | None = None,
    sink: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`block_causal_attention` of one packed projection (B, T, 3, H, D): `segment_attention_packed` with its mask.

    Args:
        qkv, segment_length, scale, return_lse, backend: as in `segment_attention_packed`.
        window, sink: as in `block_causal_attention`.

    Returns:
        As `segment_attention_packed`.

    Raises:
        ValueError: as `block_causal_attention`.
    """
    plan = once_per_kind(_plan_block_causal_packed, (qkv,), segment_length, window, sink, scale, backend)
    if window is not None:
        spec.warn_of_tokens("block_causal_attention_packed", window, plan.q_lengths, qkv.shape[1])
    return _attend_packed(qkv, plan, return_lse)


def _plan_block_causal_packed(
    qkv: torch.Tensor, segment_length: int | Sequence[int], window: int | None, sink: int, scale: float | None,
    backend: str | None, request: str | None,
) -> _Plan:  # fmt: skip
    op = "block_causal_attention_packed"
    spec.check_packed(op, qkv)
    lengths = check_segment_length(op, segment_length, "qkv", qkv.shape[1], (1, qkv.shape))
    code = causal_code(*spec.check_window(op, window, sink))
    return _planned(op, (qkv,), 1, code, lengths, lengths, scale, backend, request)


def _attend_packed(
    qkv: torch.Tensor, plan: _Plan, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The packed forms behind their checks."""
    (qkv,) = cast_to_autocast(qkv)
    qkv = qkv if plan.apart else qkv.contiguous()
    out, lse = packed_op(qkv, plan.code, plan.q_lengths, plan.scale, plan.backend)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out
