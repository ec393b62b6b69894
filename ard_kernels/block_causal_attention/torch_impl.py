"""Block-causal attention as a composition of PyTorch ops: no wasted FLOPs, no T x T mask (but for tiny T).

Forward, one attention call per query segment over the keys it sees. Backward, one call per *key* segment over the
queries that see it: that set is contiguous for every mask, dK and dV of the segment come out complete, and only
dQ is accumulated (half the additions of a loop over query segments). This is exact because each call gets the
global output and log-sum-exp. Block-diagonal masks over equal segments become one call by a batch reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ard_kernels.block_causal_attention.spec import dense_mask, key_ranges, query_range, useful_pairs
from ard_kernels.segments import segment_offsets

# One masked call over all T tokens costs its wasted (query, key) pairs but saves S - 1 calls. Measured on a 2-core
# Zen 5, fp32, H 16, D 72: a call costs ~30 us, a pair of one head ~0.03 ns per element of D, so a call is worth ~1e6
# pair-elements (S=4: dense wins up to L=16, loses from L=32 on).
DENSE_PAIR_ELEMENTS_PER_CALL = 1_000_000
MOST_DENSE_TOKENS = 1024  # a mask of 4 MiB in fp32; many tiny segments would ask for more

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# What scaled_dot_product_attention calls on the CPU; called directly for its log-sum-exp and its backward.
_FLASH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    return None


def out_like(q_BHTD: torch.Tensor) -> torch.Tensor:
    """Empty (B, H, T, D) with (B, T, H, D) memory, the layout every backend returns: reshaping to (B, T, C) is free."""
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, D).transpose(1, 2)


def gradients_like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
    """Memory for dq, dk, dv."""
    return out_like(q), out_like(k), out_like(v)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fused(device: torch.device) -> bool:
    return device.type == "cpu"


def attend(q, k, v, scale: float, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v and lse (B, H, T). The CPU has a fused kernel; elsewhere fp32 matmuls."""
    if _fused(q.device):
        return _FLASH_FORWARD(q, k, v, attn_mask=mask, scale=scale)
    acc = lse_dtype(q.dtype)
    scores = q.to(acc) @ k.to(acc).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(acc)).to(q.dtype), lse


def attend_backward(grad_out, q, k, v, out, lse, scale: float, mask=None) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) of `attend` restricted to these queries and keys, given the *global* out and lse of the queries."""
    if _fused(q.device):
        return _FLASH_BACKWARD(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    acc = lse_dtype(q.dtype)
    q_, k_, v_, grad_out_ = q.to(acc), k.to(acc), v.to(acc), grad_out.to(acc)
    scores = q_ @ k_.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    p = (scores - lse[..., None]).exp()
    delta = (grad_out_ * out.to(acc)).sum(-1, keepdim=True)
    ds = p * (grad_out_ @ v_.transpose(-1, -2) - delta) * scale
    return (ds @ k_).to(q.dtype), (ds.transpose(-1, -2) @ q_).to(q.dtype), (p.transpose(-1, -2) @ grad_out_).to(q.dtype)


class Plan(NamedTuple):
    """How to run one shape; made once, since tiny ones would notice."""

    offsets: list[int]
    keys: list[list[tuple[int, int]]]  # per query segment
    queries: list[tuple[int, int]]  # per key segment
    folded: bool  # block-diagonal over equal segments: one call on a batch of segments
    mask: torch.Tensor | None  # (T, T) of 0 and -inf, where one masked call is cheapest


@lru_cache(maxsize=16)
def _additive_mask(tokens, dtype, device, lengths, window, sink) -> torch.Tensor:
    seen = dense_mask(lengths, tokens, window, sink, device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


@lru_cache(maxsize=64)
def _make_plan(
    shape_BHTD: torch.Size, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...], window: int | None,
    sink: int,
) -> Plan:  # fmt: skip
    B, H, T, D = shape_BHTD
    offsets = segment_offsets(lengths, T)
    segments = range(len(offsets) - 1)
    folded = len(segments) == 1 or (window == 1 and sink == 0 and len(lengths) == 1)
    wasted = T * T - useful_pairs(lengths, T, window, sink)
    mask = None
    cheap = wasted * B * H * D <= (len(segments) - 1) * DENSE_PAIR_ELEMENTS_PER_CALL
    if not folded and cheap and T <= MOST_DENSE_TOKENS:
        mask = _additive_mask(T, dtype, device, lengths, window, sink)
    return Plan(
        offsets,
        [key_ranges(offsets, segment, window, sink) for segment in segments],
        [query_range(offsets, segment, window, sink) for segment in segments],
        folded,
        mask,
    )


def _fold(x_BHTD: torch.Tensor, length: int) -> torch.Tensor:
    """(B, H, S*L, D) as (B*S, H, L, D): a view for packed qkv, (B, T, H, D) memory and B = 1; else a copy."""
    return x_BHTD.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)


def _unfold(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Inverse of `_fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def gather(x_BHTD: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [x_BHTD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def as_output(x_BHTD: torch.Tensor) -> torch.Tensor:
    """x itself when its memory is (B, T, H, D), as the CPU kernel makes it; else a copy that is."""
    x_BTHD = x_BHTD.transpose(1, 2)
    return x_BHTD if x_BTHD.is_contiguous() else x_BTHD.contiguous().transpose(1, 2)


def _cat_tokens(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Segments (B, H, L_s, D) -> (B, H, T, D) with (B, T, H, D) memory, in one pass."""
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _finished(grads: Sequence[torch.Tensor], into: Gradients | None) -> Gradients:
    """Gradients that one call made: copied to `into`, or with the memory order of an output, mostly as they are."""
    if into is None:
        return tuple(map(as_output, grads))
    for grad, whole in zip(grads, into, strict=True):
        whole.copy_(grad)
    return into


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    window: int | None,
    sink: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v (B, H, T, D) -> out (B, H, T, D) with (B, T, H, D) memory, lse (B, H, T) contiguous."""
    B, H, T, _ = q.shape
    if q.numel() == 0:
        return out_like(q), q.new_empty(B, H, T, dtype=lse_dtype(q.dtype))
    plan = _make_plan(q.shape, q.dtype, q.device, tuple(lengths), window, sink)
    if plan.folded:
        out, lse = attend(*(_fold(x, plan.offsets[1]) for x in (q, k, v)), scale)
        return as_output(_unfold(out, B)), _unfold(lse[..., None], B)[..., 0].contiguous()
    if plan.mask is not None:
        out, lse = attend(q, k, v, scale, plan.mask)
        return as_output(out), lse.contiguous()
    parts = []
    for segment, ranges in enumerate(plan.keys):
        rows = slice(plan.offsets[segment], plan.offsets[segment + 1])
        parts.append(attend(q[:, :, rows], gather(k, ranges), gather(v, ranges), scale))
    outs, lses = zip(*parts, strict=True)
    return _cat_tokens(outs), torch.cat(lses, 2)


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: Sequence[int],
    window: int | None,
    sink: int,
    scale: float,
    into: Gradients | None = None,
) -> Gradients:
    """dq, dk, dv, written to `into` where given: three (B, H, T, D) tensors of any strides."""
    T = q.shape[2]
    if q.numel() == 0:
        return into or gradients_like(q, k, v)
    plan = _make_plan(q.shape, q.dtype, q.device, tuple(lengths), window, sink)
    if plan.folded:
        length = plan.offsets[1]
        folded = (_fold(x, length) for x in (grad_out, q, k, v, out))
        grads = attend_backward(*folded, _fold(lse[..., None], length)[..., 0], scale)
        return _finished([_unfold(grad, q.shape[0]) for grad in grads], into)
    if plan.mask is not None:
        return _finished(attend_backward(grad_out, q, k, v, out, lse, scale, plan.mask), into)
    into = into or gradients_like(q, k, v)
    dq, dk, dv = into
    dq_sum = None
    for segment, (start, stop) in enumerate(plan.queries):
        keys = slice(plan.offsets[segment], plan.offsets[segment + 1])
        queries = (x[:, :, start:stop] for x in (grad_out, q))
        statistics = (x[:, :, start:stop] for x in (out, lse))
        part, dk[:, :, keys], dv[:, :, keys] = attend_backward(
            *queries, k[:, :, keys], v[:, :, keys], *statistics, scale
        )
        if dq_sum is None and (start, stop) == (0, T):  # dQ accumulates in fp32, also for half precision
            dq_sum = part.to(lse_dtype(q.dtype))
            continue
        dq_sum = torch.zeros_like(q, dtype=lse_dtype(q.dtype)) if dq_sum is None else dq_sum
        dq_sum[:, :, start:stop].add_(part)
    dq.copy_(dq_sum)
    return into
