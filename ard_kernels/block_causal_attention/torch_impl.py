"""Block-causal attention as a composition of PyTorch ops: no T x T mask (but for tiny T).

Forward, one attention call per group of query segments over the keys they see. Backward, one call per group of *key*
segments over the queries that see them: that set is contiguous for every mask, dK and dV of the group come out
complete, and only dQ is accumulated (half the additions of a loop over query segments). This is exact because each call
gets the global output and log-sum-exp. A group is one segment, whose call wastes no FLOP, or several short ones under a
mask. Block-diagonal masks over equal segments become one call by a batch reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.spec import empty_output, key_ranges, query_range, sees, segment_ids
from ard_kernels.common.autocast import without_autocast
from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.common.library import private
from ard_kernels.common.segments import segment_offsets

# Segments shorter than ALONE share calls, GROUP tokens or more in each; longer ones have a call each. Measured with
# AVX2, fp32, 1 thread, forward + backward in ms by tokens of a group (first: a call per segment):
#   L=1  S=4096 B=1 H=4  D=64   > 2500 | 32: 788 | 64: 656 | 128: 646 | 256: 608 | one mask: 1316
#   L=16 S=4    B=16 H=16 D=72      44 | 32:  39 | 64:  34 (one mask)
#   L=16 S=4    B=64 H=4  D=16    12.1 | 32: 11.7 | 64: 8.7 (one mask)
#   L=32 S=16   B=4 H=8 D=64 w=4    47 |           64:  56 | 128: 61
#   L=64 S=4    B=1 H=16  D=72      18 |                     128: 21 | 256: 29
ALONE, GROUP = 32, 64
# With fewer keys than a vector has lanes, PyTorch's kernel makes 0 of a NaN (torch 2.13), but not so under a mask.
FEWEST_KEYS = 16
MOST_KEPT_PAIRS = 1 << 20  # masks of 4 MiB in fp32 are kept for the next call of their shape; larger ones are made anew

Gradients = tuple[Tensor, Tensor, Tensor]
TokenRanges = list[tuple[int, int]]  # [start, stop)

# What scaled_dot_product_attention calls on the CPU; called directly for its log-sum-exp and its backward. None in a
# version of torch that has them under other names: matmuls serve there too.
_FLASH_FORWARD = private("ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
_FLASH_BACKWARD = private("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")


def _fused(device: torch.device) -> bool:
    return device.type == "cpu" and _FLASH_FORWARD is not None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v and lse (B, H, T). The CPU has a fused kernel; elsewhere fp32 matmuls."""
    if _fused(q.device):
        if mask is None and k.shape[2] < FEWEST_KEYS:
            mask = q.new_zeros(q.shape[2], k.shape[2])
        return _FLASH_FORWARD(q, k, v, attn_mask=mask, scale=scale)
    return _attend(q, k, v, scale, mask)


@without_autocast
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`attend` by matmuls."""
    acc = accumulation_dtype(q.dtype)
    scores = q.to(acc) @ k.to(acc).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(acc)).to(q.dtype), lse


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, mask: Tensor | None
) -> Gradients:
    """(dq, dk, dv) of `attend` restricted to these queries and keys, given the *global* out and lse of the queries."""
    if _fused(q.device):
        return _FLASH_BACKWARD(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    return _attend_backward(grad_out, q, k, v, out, lse, scale, mask)


@without_autocast
def _attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, mask: Tensor | None
) -> Gradients:
    """`attend_backward` by matmuls."""
    acc = accumulation_dtype(q.dtype)
    q_, k_, v_, grad_out_ = q.to(acc), k.to(acc), v.to(acc), grad_out.to(acc)
    scores = q_ @ k_.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    p = (scores - lse[..., None]).exp()
    delta = (grad_out_ * out.to(acc)).sum(-1, keepdim=True)
    ds = p * (grad_out_ @ v_.transpose(-1, -2) - delta) * scale
    return (ds @ k_).to(q.dtype), (ds.transpose(-1, -2) @ q_).to(q.dtype), (p.transpose(-1, -2) @ grad_out_).to(q.dtype)


class Block(NamedTuple):
    """One attention call: the queries of one or several segments (backward: the keys), and what any of them sees."""

    rows: tuple[int, int]
    columns: TokenRanges
    make_mask: Callable[[], Tensor] | None  # None: all rows see all columns

    def mask(self) -> Tensor | None:
        """(queries, keys) of 0 and -inf."""
        return None if self.make_mask is None else self.make_mask()


class Plan(NamedTuple):
    """How to run one shape; made once, since tiny ones would notice."""

    folded: int  # tokens per segment where a block-diagonal mask is one call on a batch of segments; else 0
    forward: list[Block]
    backward: list[Block]


def _groups(offsets: Sequence[int], grouped: bool) -> list[tuple[int, int]]:
    """(first, stop) segments that share a call."""
    groups: list[tuple[int, int]] = []
    first = 0
    for stop in range(1, len(offsets)):
        long = offsets[stop] - offsets[stop - 1] >= ALONE
        if long and first < stop - 1:
            groups.append((first, stop - 1))
            first = stop - 1
        if not grouped or long or offsets[stop] - offsets[first] >= GROUP or stop == len(offsets) - 1:
            groups.append((first, stop))
            first = stop
    return groups


def _union(ranges: Sequence[TokenRanges]) -> TokenRanges:
    """Token ranges that any of the segments' ranges hold, in order; touching ones are merged."""
    merged: TokenRanges = []
    for start, stop in sorted({pair for own in ranges for pair in own}):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _additive_mask(
    segment_T: Tensor, window: int | None, sink: int, queries: TokenRanges, keys: TokenRanges, dtype: torch.dtype
) -> Tensor:
    """(queries, keys) of 0 and -inf for token ranges of both."""
    query_Q, key_K = (torch.cat([segment_T[slice(*each)] for each in ranges]) for ranges in (queries, keys))
    seen = sees(query_Q, key_K, window, sink)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _blocks(
    offsets: Sequence[int], ranges: list[TokenRanges], grouped: bool, make: Callable[[TokenRanges, TokenRanges], Tensor]
) -> list[Block]:
    """The calls for what each segment sees; `make` makes the mask of (rows, columns)."""
    blocks: list[Block] = []
    pairs = 0
    for first, stop in _groups(offsets, grouped):
        rows, columns = (offsets[first], offsets[stop]), _union(ranges[first:stop])
        alike = all(own == ranges[first] for own in ranges[first:stop])
        pairs += 0 if alike else (rows[1] - rows[0]) * sum(b - a for a, b in columns)
        blocks.append(Block(rows, columns, None if alike else partial(make, [rows], columns)))
    if pairs > MOST_KEPT_PAIRS:
        return blocks
    return [block if block.make_mask is None else block._replace(make_mask=cache(block.make_mask)) for block in blocks]


@lru_cache(maxsize=64)
def _make_plan(
    T: int, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...], window: int | None, sink: int,
    grouped: bool,
) -> Plan:  # fmt: skip
    """grouped: whether segments may share a call under a mask."""
    offsets = segment_offsets(lengths, T)
    segments = range(len(offsets) - 1)
    if len(segments) == 1 or (window == 1 and sink == 0 and len(lengths) == 1):
        return Plan(offsets[1], [], [])
    segment_T = segment_ids(lengths, T, device)

    def mask(queries: TokenRanges, keys: TokenRanges) -> Tensor:
        return _additive_mask(segment_T, window, sink, queries, keys, dtype)

    keys = [key_ranges(offsets, segment, window, sink) for segment in segments]
    queries = [[query_range(offsets, segment, window, sink)] for segment in segments]
    return Plan(
        0,
        _blocks(offsets, keys, grouped, mask),
        _blocks(offsets, queries, grouped, lambda rows, cols: mask(cols, rows)),
    )


def _fold(x_BHTD: Tensor, length: int) -> Tensor:
    """(B, H, S*L, D) as (B*S, H, L, D): a view for packed qkv, (B, T, H, D) memory and B = 1; else a copy."""
    return x_BHTD.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Inverse of `_fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def gather(x_BHTD: Tensor, ranges: TokenRanges) -> Tensor:
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    window: int | None,
    sink: int,
    scale: float,
    grouped: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, T, D), not empty -> out (B, H, T, D) with (B, T, H, D) memory, lse (B, H, T) contiguous.

    grouped: see `_make_plan`; None: where PyTorch's kernel is fused.
    """
    grouped = _fused(q.device) if grouped is None else grouped
    plan = _make_plan(q.shape[2], q.dtype, q.device, tuple(lengths), window, sink, grouped)
    if plan.folded:
        q_folded, k_folded, v_folded = (_fold(x, plan.folded) for x in (q, k, v))
        out, lse = attend(q_folded, k_folded, v_folded, scale)
        return as_output(_unfold(out, q.shape[0])), _unfold(lse[..., None], q.shape[0])[..., 0].contiguous()
    parts = []
    for block in plan.forward:
        keys, values = gather(k, block.columns), gather(v, block.columns)
        parts.append(attend(q[:, :, slice(*block.rows)], keys, values, scale, block.mask()))
    outs, lses = zip(*parts, strict=True)
    one = len(parts) == 1
    out, lse = (as_output(outs[0]), lses[0].contiguous()) if one else (_cat_tokens(outs), torch.cat(lses, 2))
    if any(block.make_mask for block in plan.forward) and not _finite(out):
        return forward(q, k, v, lengths, window, sink, scale, grouped=False)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    window: int | None,
    sink: int,
    scale: float,
    into: Gradients | None = None,
    grouped: bool | None = None,
) -> Gradients:
    """dq, dk, dv, written to `into` where given: (B, H, T, D) tensors of any strides. grouped: as in `forward`."""
    grouped = _fused(q.device) if grouped is None else grouped
    plan = _make_plan(q.shape[2], q.dtype, q.device, tuple(lengths), window, sink, grouped)
    if plan.folded:
        grad_f, q_f, k_f, v_f, out_f, lse_f = (_fold(x, plan.folded) for x in (grad_out, q, k, v, out, lse[..., None]))
        shares = attend_backward(grad_f, q_f, k_f, v_f, out_f, lse_f[..., 0], scale, None)
        return _finished([_unfold(grad, q.shape[0]) for grad in shares], into)
    if len(plan.backward) == 1:
        grads = _finished(attend_backward(grad_out, q, k, v, out, lse, scale, plan.backward[0].mask()), into)
    else:
        grads = into or (empty_output(q), empty_output(k), empty_output(v))
        _accumulate(plan.backward, grad_out, q, k, v, out, lse, scale, grads)
    if any(block.make_mask for block in plan.backward) and not _finite(*grads):
        return backward(grad_out, q, k, v, out, lse, lengths, window, sink, scale, grads, grouped=False)
    return grads


def _accumulate(
    blocks: list[Block], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    into: Gradients,
) -> None:  # fmt: skip
    """dk and dv block by block, and dq as the sum of the blocks' shares, in fp32 also for half precision."""
    dq, dk, dv = into
    dq_sum: Tensor | None = None
    for block in blocks:
        keys, ((start, stop),) = slice(*block.rows), block.columns
        grad_here, q_here, out_here, lse_here = (x[:, :, start:stop] for x in (grad_out, q, out, lse))
        part, dk[:, :, keys], dv[:, :, keys] = attend_backward(
            grad_here, q_here, k[:, :, keys], v[:, :, keys], out_here, lse_here, scale, block.mask()
        )
        if dq_sum is None and (start, stop) == (0, q.shape[2]):
            dq_sum = part.to(accumulation_dtype(q.dtype))
            continue
        dq_sum = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype)) if dq_sum is None else dq_sum
        dq_sum[:, :, start:stop].add_(part)
    dq.copy_(dq_sum)  # type: ignore[arg-type]  # there is a block


def _finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite. False may be an overflow of the sum.

    Under a mask a weight of 0 makes NaN of an infinity that its query may not see: then each segment gets its own call.
    """
    return all(x.sum(dtype=accumulation_dtype(x.dtype)).isfinite() for x in tensors)


def composite(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` of PyTorch ops that can be differentiated in any mode and order: per segment, scores in memory."""
    offsets = segment_offsets(lengths, q.shape[2])
    parts = []
    for segment, (start, stop) in enumerate(pairwise(offsets)):
        ranges = key_ranges(offsets, segment, window, sink)
        parts.append(_attend(q[:, :, start:stop], gather(k, ranges), gather(v, ranges), scale))
    outs, lses = zip(*parts, strict=True)
    return _cat_tokens(outs), torch.cat(lses, 2).detach()
