"""Attention over segments: every token sees its own segment and the allowed earlier ones (ARD, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from ard_kernels.block_causal_attention import spec
from ard_kernels.block_causal_attention.op import forward_op, packed_op
from ard_kernels.common.arguments import check_scale
from ard_kernels.common.autocast import cast_to_autocast
from ard_kernels.common.backends import resolve
from ard_kernels.common.segments import check_segment_length

__all__ = ["block_causal_attention", "block_causal_attention_packed"]

OP = "block_causal_attention"


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
    """softmax(scale * Q K^T + mask) V, where a query of segment s sees segments s-window+1 .. s and the first `sink`.

    Args:
        q, k, v: (B, H, T, D), or (B, T, H, D) with layout "bthd"; fp32, bf16 or fp16 (fp64 on the torch backend),
            D a multiple of 8 up to 256. Any strides with a contiguous last dim are read in place, so the three may be
            views of one packed qkv projection; tokens that overlap in memory are copied first.
        segment_length: tokens per segment L (T = S * L), or the S lengths of ragged segments.
        window: *segments* (not tokens) a query sees, its own included; None sees all earlier ones, and so does any
            window >= S. `window=1` is block-diagonal.
        sink: the first `sink` segments are seen by every later query.
        scale: softmax scale, a number; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of each query's scores, (B, H, T) fp32, not differentiable.
        backend: None chooses; see `ard_kernels.backends()`.

    Returns:
        out, like q in shape, layout and dtype, its memory ordered (B, T, H, D); with return_lse (out, lse).
        Accumulation is fp32. Under autocast q, k, v are cast to its dtype first, as scaled_dot_product_attention does.
        A NaN or infinity reaches the queries that see it and no others; on GPU backends also queries whose tile holds
        its segment (a product with a zero weight).

    Raises:
        ValueError: a shape, dtype, device, segment, window, sink or backend outside this contract.

    Source: ARD, arXiv 2504.11295, Sec. 3 and Fig. 4 (masks M1 window=1, M2 window=2, M3 window=1 sink=1, M4 None).
    """
    spec.check_qkv(OP, q, k, v, layout)
    token_dim = layout.index("t")
    lengths = check_segment_length(OP, segment_length, "q", q.shape[token_dim], (token_dim, q.shape, layout))
    window, sink = spec.check_window(OP, window, sink)
    scale = check_scale(OP, scale, q.shape[-1])
    q, k, v = (x if spec.rows_apart(x, token_dim) else x.contiguous() for x in cast_to_autocast(q, k, v))
    chosen = resolve(OP, backend, q.device, q.dtype, q.shape[-1])
    if layout == "bthd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = forward_op(q, k, v, lengths, window, sink, scale, chosen)
    if layout == "bthd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


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
    """`block_causal_attention` of one packed projection, whose gradient comes back packed: no copy joins dq, dk, dv.

    Args:
        qkv: (B, T, 3, H, D), any strides with a contiguous last dim.
        segment_length, window, sink, scale, return_lse, backend: as in `block_causal_attention`.

    Returns:
        out, (B, T, H, D) contiguous; with return_lse (out, lse), lse (B, H, T) fp32.

    Raises:
        ValueError: as `block_causal_attention`.
    """
    op = "block_causal_attention_packed"
    spec.check_packed(op, qkv)
    lengths = check_segment_length(op, segment_length, "qkv", qkv.shape[1], (1, qkv.shape))
    window, sink = spec.check_window(op, window, sink)
    scale = check_scale(op, scale, qkv.shape[-1])
    (qkv,) = cast_to_autocast(qkv)
    qkv = qkv if spec.rows_apart(qkv, 1) else qkv.contiguous()
    chosen = resolve(OP, backend, qkv.device, qkv.dtype, qkv.shape[-1])
    out, lse = packed_op(qkv, lengths, window, sink, scale, chosen)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out
