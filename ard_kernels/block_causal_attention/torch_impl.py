"""Attention over segments as a composition of calls without a mask, dense.py: no T x T mask.

The calls are PyTorch's own in backend torch, those of a flash-attn package in backend flash.

Forward, one call per query segment over the keys it sees. Backward, one call per *key* segment and run of
queries that see it (block-causal masks have one run): dK and dV of the segment are complete after its last call, and
only dQ is accumulated (half the additions of a loop over query segments). This is exact because each call gets the
global output and log-sum-exp. Which calls: `plan.py`.

Where calls take no grouped heads, query heads that share a head of keys and values are more queries of that head, token
by token, so that a range of tokens stays a range: no copy of keys or values is made, and one of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.dense import Dense, Gradients, Matmuls
from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.block_causal_attention.plan import Block, make_plan
from ard_kernels.block_causal_attention.spec import Segments, empty_output, visibility
from ard_kernels.common.dtypes import accumulation_dtype


def _as_queries(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, ...) as (B, kv_heads, T * heads per kv head, ...), a token's heads one after the other."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def _as_heads(x: Tensor, tokens: int) -> Tensor:
    """Inverse of `_as_queries`; for the (B, T, H, D) memory of an output a view."""
    return x.unflatten(2, (tokens, -1)).transpose(2, 3).flatten(1, 2)


def _of_queries(segments: Segments, group: int) -> Segments:
    """The segments of `_as_queries`, of `group` heads."""
    return segments._replace(q_lengths=tuple([length * group for length in segments.q_lengths]))


def _fold(x_BHTD: Tensor, length: int) -> Tensor:
    """(B, H, S*L, D) as (B*S, H, L, D): a view for packed qkv, (B, T, H, D) memory and B = 1; else a copy."""
    return x_BHTD.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Inverse of `_fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def gather(x_BHTD: Tensor, ranges: list[Run]) -> Tensor:
    parts = [x_BHTD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def as_output(x_BHTD: Tensor) -> Tensor:
    """x itself when its memory is (B, T, H, D), as the CPU kernel makes it; else a copy that is."""
    x_BTHD = x_BHTD.transpose(1, 2)
    return x_BHTD if x_BTHD.is_contiguous() else x_BTHD.contiguous().transpose(1, 2)


def _cat_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Segments (B, H, L_s, D) -> (B, H, T, D) with (B, T, H, D) memory, in one pass."""
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _finished(grads: Sequence[Tensor], into: Gradients | None) -> Gradients:
    """Gradients that one call made: copied to `into`, or with the memory order of an output, mostly as they are."""
    if into is None:
        dq, dk, dv = map(as_output, grads)
        return dq, dk, dv
    for grad, whole in zip(grads, into, strict=True):
        whole.copy_(grad)
    return into


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, dense: Dense) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k, v, not empty -> out (B, H, T, D) with (B, T, H, D) memory, lse (B, H, T) contiguous."""
    if q.shape[1] != k.shape[1] and not dense.grouped:
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        out, lse = forward(_as_queries(q, kv_heads), k, v, _of_queries(segments, group), scale, dense)
        return as_output(_as_heads(out, q.shape[2])), _as_heads(lse, q.shape[2]).contiguous()
    plan = make_plan(q.shape[2], k.shape[2], segments)
    if plan.folded:
        length, k_length = plan.folded
        out, lse = dense.attend(_fold(q, length), _fold(k, k_length), _fold(v, k_length), scale)
        return as_output(_unfold(out, q.shape[0])), _unfold(lse[..., None], q.shape[0])[..., 0].contiguous()
    parts = []
    for (start, stop), columns in plan.by_query:
        rows = q[:, :, start:stop]
        if columns:
            parts.append(dense.attend(rows, gather(k, columns), gather(v, columns), scale))
        else:
            parts.append(_unseeing(rows))
    outs, lses = zip(*parts, strict=True)
    if len(parts) == 1:
        return as_output(outs[0]), lses[0].contiguous()
    return _cat_tokens(outs), torch.cat(lses, 2)


def _unseeing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of queries that see nothing."""
    return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=accumulation_dtype(q.dtype))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    segments: Segments, scale: float, dense: Dense, into: Gradients | None = None,
) -> Gradients:  # fmt: skip
    """dq, dk, dv, written to `into` where given: tensors like q, k, v of any strides."""
    if q.shape[1] != k.shape[1] and not dense.grouped:
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        grad_g, q_g, out_g, lse_g = (_as_queries(x, kv_heads) for x in (grad_out, q, out, lse))
        dlse_g = None if grad_lse is None else _as_queries(grad_lse, kv_heads)
        dq, dk, dv = backward(grad_g, dlse_g, q_g, k, v, out_g, lse_g, _of_queries(segments, group), scale, dense)
        return _finished((_as_heads(dq, q.shape[2]), dk, dv), into)
    plan = make_plan(q.shape[2], k.shape[2], segments)
    if plan.folded:
        length, k_length = plan.folded
        grad_f, q_f, out_f = (_fold(x, length) for x in (grad_out, q, out))
        lse_f, *grad_lse_f = (
            _fold(x[..., None], length)[..., 0] for x in (lse, *([] if grad_lse is None else [grad_lse]))
        )
        k_f, v_f = (_fold(x, k_length) for x in (k, v))
        dlse_f = grad_lse_f[0] if grad_lse_f else None
        shares = dense.attend_backward(grad_f, dlse_f, q_f, k_f, v_f, out_f, lse_f, scale)
        return _finished([_unfold(grad, q.shape[0]) for grad in shares], into)
    if plan.by_key == [((0, k.shape[2]), [(0, q.shape[2])])]:
        return _finished(dense.attend_backward(grad_out, grad_lse, q, k, v, out, lse, scale), into)
    grads = into or (empty_output(q), empty_output(k), empty_output(v))
    _accumulate(plan.by_key, grad_out, grad_lse, q, k, v, out, lse, scale, dense, grads)
    return grads


def _accumulate(
    blocks: list[Block], grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, scale: float, dense: Dense, into: Gradients,
) -> None:  # fmt: skip
    """dk and dv segment by segment, and dq as the sum of their shares, summed in fp32 also for half precision."""
    dq, *of_keys = into
    acc = accumulation_dtype(q.dtype)
    dq_sum = dq.zero_() if dq.dtype == acc else torch.zeros_like(q, dtype=acc)
    for (first, last), columns in blocks:
        keys = slice(first, last)
        if not columns:
            for whole in of_keys:
                whole[:, :, keys] = 0
        for i, (start, stop) in enumerate(columns):
            grad_here, q_here, out_here, lse_here = (x[:, :, start:stop] for x in (grad_out, q, out, lse))
            dlse_here = None if grad_lse is None else grad_lse[:, :, start:stop]
            part, *shares = dense.attend_backward(
                grad_here, dlse_here, q_here, k[:, :, keys], v[:, :, keys], out_here, lse_here, scale
            )
            for whole, share in zip(of_keys, shares, strict=True):
                if i == 0:
                    whole[:, :, keys] = share
                else:
                    whole[:, :, keys].add_(share)
            dq_sum[:, :, start:stop].add_(part)
    if dq_sum is not dq:
        dq.copy_(dq_sum)


def composite(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` of PyTorch ops that can be differentiated in any mode and order: per segment, scores in memory."""
    seen = visibility(segments, q.shape[2], k.shape[2])
    parts = []
    for (start, stop), ranges in zip(pairwise(seen.q_offsets), seen.keys, strict=True):
        rows = q[:, :, start:stop]
        if ranges:
            out, lse = Matmuls.attend(_as_queries(rows, k.shape[1]), gather(k, ranges), gather(v, ranges), scale)
            parts.append((_as_heads(out, stop - start), _as_heads(lse, stop - start)))
        else:
            parts.append(_unseeing(rows))
    outs, lses = zip(*parts, strict=True)
    return _cat_tokens(outs), torch.cat(lses, 2)
