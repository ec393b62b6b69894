# mypy: allow-untyped-defs
"""Attention over segments in Triton: forward, dQ, and dK with dV; one launch each for all segments and masks.

A program takes one row tile of one (batch, head): queries for the forward and dQ, keys for dK and dV. Which column
tiles it visits is the table of `tiles.py`; the kernels only move data. No atomics: every output element has one writer,
which sums in a fixed order, so results are bit-equal over runs. SHARE query heads read one head of keys and values: a
program of keys goes through the queries of all of them.

    scores  s = scale * q k^T,  p = exp(s - lse) = exp2(s * log2(e) - lse2)
    forward o = p v,  lse = m + log(sum exp(s - m)) with a running maximum m
    dQ      delta = rowsum(do * o) - dlse,  ds = p * (do v^T - delta),  dq = scale * ds k
    dK, dV  dk = scale * ds^T q,  dv = p^T do

The dQ kernel runs first and leaves delta for the other: it holds o and do of its rows anyway. Recomputing s and p in
both costs 2 matmuls of 7; a single pass would have to add dQ up across programs in fp32 through memory, which at D = 72
moves more time than it saves (T = 1024: 3 MB per head against 0.19 GFLOP).

The bodies of the loops over full and masked tiles stand twice. In a function called from both loops the instructions of
the PTX are the same, but not its line tables, and with those ptxas spills dQ for sm_80 (8 bytes at D = 72, 56 at 128).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.block_causal_attention.tiles import Schedule, heads_per_group, schedule
from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import keep_if_captured, on_device
from ard_kernels.common.triton_parts import (
    add_dot,
    dot_transposed,
    load_rows,
    scale_rows,
    split_width,
    store_rows,
    zero_rows,
)
from ard_kernels.common.triton_support import Launch, strides

# Arguments of which Triton shall not compile one variant that are multiples of 16 and one that are not.
SIZES = ["H", "T", "batch_heads", "group", "tiles"]  # H, batch_heads: of the programs; T: of the queries
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(program, batch_heads, group, tiles):
    """(tile, batch * H + head) of a program: heads in groups, within a group all heads' first tile, then the next."""
    first = program // (group * tiles) * group
    size = min(group, batch_heads - first)
    within = program - first * tiles
    return within // size, first + within % size


@triton.jit
def base_of(pointer, stride, batch, head, UNIT: tl.constexpr):
    """Start of one (batch, head); 64-bit, since a packed projection may pass 2**31 elements."""
    return pointer + (batch.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[1]) * UNIT


@triton.jit
def rows_of(base, stride, tokens, UNIT: tl.constexpr):
    """Addresses of the rows of `tokens`."""
    return base + tokens.to(tl.int64) * (stride[2] * UNIT)


@triton.jit
def _visible(columns, tile, bounds, segments):
    """(rows, columns): the mask predicate on the packed bounds of the rows' segments; the tile starts at `tile`.

    On the columns themselves, which change with the tile: those counted from its start would stay in registers. The
    tables are padded, so that rows past the item's last can be looked up, too: what they see is not stored.
    """
    own = tl.load(bounds + tl.load(segments))[:, None]
    first_stop, start, stop = tile + (own & 1023), tile + (own >> 10 & 1023), tile + (own >> 20)
    columns = columns[None, :]
    return (columns < first_stop) | ((columns >= start) & (columns < stop))


@triton.jit
def _base2_lse(lse):
    """lse * log2(e), and 0 for a row that sees nothing: all its scores are -inf, and -inf - -inf is not a number."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)


@triton.jit
def online_softmax(scores, scale, maximum, total, GUARD: tl.constexpr):
    """One step of the running softmax in base 2: (p, new maximum, new total, factor for what was summed before).

    GUARD: a row may have seen no key yet; its maximum is -inf then, and -inf - -inf is not a number.
    """
    new = tl.maximum(maximum, tl.max(scores, 1) * scale)
    finite = tl.where(new == float("-inf"), 0.0, new) if GUARD else new
    p = tl.exp2(scores * scale - finite[:, None])
    factor = tl.exp2(maximum - finite)
    return p, new, total * factor + tl.sum(p, 1), factor


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, out, lse, items, masked, bounds, row_segments, q_stride, k_stride, v_stride, out_stride,
    H, T, batch_heads, group, tiles, scale,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SIGN: tl.constexpr, SHARE: tl.constexpr,
    HAS_MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of one query tile. `scale` is |scale| * log2(e): the maximum of scale * s is scale * the maximum."""
    tile, batch_head = head_of(tl.program_id(0), batch_heads, group, tiles)
    item = items + tile * 8
    row, row_stop = tl.load(item), tl.load(item + 1)
    batch, head = batch_head // H, batch_head % H
    rows = row + tl.arange(0, BLOCK_M)
    here = rows < row_stop
    kv_head = head // SHARE
    k_base, v_base = base_of(k, k_stride, batch, kv_head, UNIT), base_of(v, v_stride, batch, kv_head, UNIT)
    q_rows = load_rows(rows_of(base_of(q, q_stride, batch, head, UNIT), q_stride, rows, UNIT), here, D, PARTS)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulators = zero_rows(BLOCK_M, PARTS)
    first_start, first_tiles = tl.load(item + 2), tl.load(item + 3)
    second_start, second_tiles = tl.load(item + 4), tl.load(item + 5)
    for j in range(0, first_tiles + second_tiles):
        start = tl.where(j < first_tiles, first_start + j * BLOCK_N, second_start + (j - first_tiles) * BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        k_rows = load_rows(rows_of(k_base, k_stride, keys, UNIT), keys, D, PARTS, False)
        v_rows = load_rows(rows_of(v_base, v_stride, keys, UNIT), keys, D, PARTS, False)
        scores = dot_transposed(q_rows, k_rows, PRECISION) * SIGN
        p, maximum, total, factor = online_softmax(scores, scale, maximum, total, False)
        accumulators = scale_rows(accumulators, factor[:, None])
        accumulators = add_dot(p.to(v.dtype.element_ty), v_rows, accumulators, PRECISION)
    if HAS_MASKED:
        for j in range(tl.load(item + 6), tl.load(item + 7)):
            start, stop, at = tl.load(masked + 4 * j), tl.load(masked + 4 * j + 1), tl.load(masked + 4 * j + 2)
            keys = start + tl.arange(0, BLOCK_N)
            k_rows = load_rows(rows_of(k_base, k_stride, keys, UNIT), keys < stop, D, PARTS)
            v_rows = load_rows(rows_of(v_base, v_stride, keys, UNIT), keys < stop, D, PARTS)
            scores = dot_transposed(q_rows, k_rows, PRECISION) * SIGN
            visible = _visible(keys, start, bounds + at, row_segments + rows)
            scores = tl.where(visible, scores * scale, float("-inf"))
            p, maximum, total, factor = online_softmax(scores, 1.0, maximum, total, True)
            accumulators = scale_rows(accumulators, factor[:, None])
            accumulators = add_dot(p.to(v.dtype.element_ty), v_rows, accumulators, PRECISION)

    out_rows = rows_of(base_of(out, out_stride, batch, head, UNIT), out_stride, rows, UNIT)
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: out 0, lse -inf
    store_rows(out_rows, scale_rows(accumulators, (1.0 / total)[:, None]), here, D, PARTS)
    lse_rows = lse + batch_head.to(tl.int64) * T + rows
    tl.store(lse_rows, (maximum + tl.log2(total)) / LOG2_E, mask=here)


@triton.jit
def _score_gradient(scores, scale, lse2, delta, dp):
    """(p, ds / scale); every argument (rows, columns) or broadcastable to it."""
    p = tl.exp2(scores * scale - lse2)
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=SIZES)
def _backward_dq(
    grad_out, grad_lse, q, k, v, out, lse, delta, dq, items, masked, bounds, row_segments,
    grad_stride, q_stride, k_stride, v_stride, out_stride, dq_stride,
    H, T, batch_heads, group, tiles, scale,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SHARE: tl.constexpr, HAS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and delta of one query tile."""
    tile, batch_head = head_of(tl.program_id(0), batch_heads, group, tiles)
    item = items + tile * 8
    row, row_stop = tl.load(item), tl.load(item + 1)
    batch, head = batch_head // H, batch_head % H
    rows = row + tl.arange(0, BLOCK_M)
    here = rows < row_stop
    kv_head = head // SHARE
    k_base, v_base = base_of(k, k_stride, batch, kv_head, UNIT), base_of(v, v_stride, batch, kv_head, UNIT)
    do_rows = load_rows(
        rows_of(base_of(grad_out, grad_stride, batch, head, UNIT), grad_stride, rows, UNIT), here, D, PARTS
    )
    out_rows = load_rows(rows_of(base_of(out, out_stride, batch, head, UNIT), out_stride, rows, UNIT), here, D, PARTS)
    delta_rows = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(PARTS)):
        delta_rows += tl.sum(do_rows[i].to(tl.float32) * out_rows[i].to(tl.float32), 1)
    statistics = batch_head.to(tl.int64) * T + rows
    lse_rows = tl.load(lse + statistics, mask=here, other=0.0)
    if grad_lse is not None:
        delta_rows -= tl.load(grad_lse + statistics, mask=here & (lse_rows != float("-inf")), other=0.0)
    tl.store(delta + statistics, delta_rows, mask=here)
    q_rows = load_rows(rows_of(base_of(q, q_stride, batch, head, UNIT), q_stride, rows, UNIT), here, D, PARTS)
    lse2 = _base2_lse(lse_rows)

    accumulators = zero_rows(BLOCK_M, PARTS)
    first_start, first_tiles = tl.load(item + 2), tl.load(item + 3)
    second_start, second_tiles = tl.load(item + 4), tl.load(item + 5)
    for j in range(0, first_tiles + second_tiles):
        start = tl.where(j < first_tiles, first_start + j * BLOCK_N, second_start + (j - first_tiles) * BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        k_rows = load_rows(rows_of(k_base, k_stride, keys, UNIT), keys, D, PARTS, False)
        v_rows = load_rows(rows_of(v_base, v_stride, keys, UNIT), keys, D, PARTS, False)
        scores = dot_transposed(q_rows, k_rows, PRECISION)
        dp = dot_transposed(do_rows, v_rows, PRECISION)
        _, ds = _score_gradient(scores, scale * LOG2_E, lse2[:, None], delta_rows[:, None], dp)
        accumulators = add_dot(ds.to(k.dtype.element_ty), k_rows, accumulators, PRECISION)
    if HAS_MASKED:
        for j in range(tl.load(item + 6), tl.load(item + 7)):
            start, stop, at = tl.load(masked + 4 * j), tl.load(masked + 4 * j + 1), tl.load(masked + 4 * j + 2)
            keys = start + tl.arange(0, BLOCK_N)
            k_rows = load_rows(rows_of(k_base, k_stride, keys, UNIT), keys < stop, D, PARTS)
            v_rows = load_rows(rows_of(v_base, v_stride, keys, UNIT), keys < stop, D, PARTS)
            scores = dot_transposed(q_rows, k_rows, PRECISION)
            visible = _visible(keys, start, bounds + at, row_segments + rows)
            scores = tl.where(visible, scores * scale, float("-inf"))  # before dp: ptxas then has it easier
            dp = dot_transposed(do_rows, v_rows, PRECISION)
            _, ds = _score_gradient(scores, LOG2_E, lse2[:, None], delta_rows[:, None], dp)
            accumulators = add_dot(ds.to(k.dtype.element_ty), k_rows, accumulators, PRECISION)
    dq_rows = rows_of(base_of(dq, dq_stride, batch, head, UNIT), dq_stride, rows, UNIT)
    store_rows(dq_rows, scale_rows(accumulators, scale), here, D, PARTS)


@triton.jit
def _queries_of(
    q, grad_out, lse, delta, q_stride, grad_stride, T, batch_kv_head, batch, kv_head, member,
    UNIT: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Bases of q, grad_out, lse and delta of the member-th query head that reads a head of keys."""
    head = kv_head * SHARE + member
    statistics = (batch_kv_head.to(tl.int64) * SHARE + member) * T
    q_base, do_base = base_of(q, q_stride, batch, head, UNIT), base_of(grad_out, grad_stride, batch, head, UNIT)
    return q_base, do_base, lse + statistics, delta + statistics


@triton.jit(do_not_specialize=SIZES)
def _backward_dkv(
    grad_out, q, k, v, lse, delta, dk, dv, items, masked, bounds, row_segments,
    grad_stride, q_stride, k_stride, v_stride, dk_stride, dv_stride,
    H, T, batch_heads, group, tiles, scale,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SHARE: tl.constexpr, HAS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile (BLOCK_M keys) over BLOCK_N queries at a time; scores are transposed: keys are rows."""
    tile, batch_head = head_of(tl.program_id(0), batch_heads, group, tiles)
    item = items + tile * 8
    row, row_stop = tl.load(item), tl.load(item + 1)
    batch, head = batch_head // H, batch_head % H
    rows = row + tl.arange(0, BLOCK_M)
    here = rows < row_stop
    k_rows = load_rows(rows_of(base_of(k, k_stride, batch, head, UNIT), k_stride, rows, UNIT), here, D, PARTS)
    v_rows = load_rows(rows_of(base_of(v, v_stride, batch, head, UNIT), v_stride, rows, UNIT), here, D, PARTS)

    dk_sum, dv_sum = zero_rows(BLOCK_M, PARTS), zero_rows(BLOCK_M, PARTS)
    first_start, first_tiles = tl.load(item + 2), tl.load(item + 3)
    second_start, second_tiles = tl.load(item + 4), tl.load(item + 5)
    full = first_tiles + second_tiles
    q_base, do_base, lse_base, delta_base = _queries_of(
        q, grad_out, lse, delta, q_stride, grad_stride, T, batch_head, batch, head, 0, UNIT, SHARE
    )
    for i in range(0, full * SHARE):
        j = i
        if SHARE > 1:
            j = i % full
            q_base, do_base, lse_base, delta_base = _queries_of(
                q, grad_out, lse, delta, q_stride, grad_stride, T, batch_head, batch, head, i // full, UNIT, SHARE
            )
        start = tl.where(j < first_tiles, first_start + j * BLOCK_N, second_start + (j - first_tiles) * BLOCK_N)
        queries = start + tl.arange(0, BLOCK_N)
        q_rows = load_rows(rows_of(q_base, q_stride, queries, UNIT), queries, D, PARTS, False)
        do_rows = load_rows(rows_of(do_base, grad_stride, queries, UNIT), queries, D, PARTS, False)
        lse2, delta_row = tl.load(lse_base + queries) * LOG2_E, tl.load(delta_base + queries)
        scores = dot_transposed(k_rows, q_rows, PRECISION)
        dp = dot_transposed(v_rows, do_rows, PRECISION)
        p, ds = _score_gradient(scores, scale * LOG2_E, lse2[None, :], delta_row[None, :], dp)
        dv_sum = add_dot(p.to(v.dtype.element_ty), do_rows, dv_sum, PRECISION)
        dk_sum = add_dot(ds.to(k.dtype.element_ty), q_rows, dk_sum, PRECISION)
    if HAS_MASKED:
        first_masked = tl.load(item + 6)
        count = tl.load(item + 7) - first_masked
        for i in range(0, count * SHARE):
            j = first_masked + i
            if SHARE > 1:
                j = first_masked + i % count
                q_base, do_base, lse_base, delta_base = _queries_of(
                    q, grad_out, lse, delta, q_stride, grad_stride, T, batch_head, batch, head, i // count, UNIT, SHARE
                )
            start, stop, at = tl.load(masked + 4 * j), tl.load(masked + 4 * j + 1), tl.load(masked + 4 * j + 2)
            queries = start + tl.arange(0, BLOCK_N)
            q_rows = load_rows(rows_of(q_base, q_stride, queries, UNIT), queries < stop, D, PARTS)
            do_rows = load_rows(rows_of(do_base, grad_stride, queries, UNIT), queries < stop, D, PARTS)
            lse2 = _base2_lse(tl.load(lse_base + queries, mask=queries < stop, other=0.0))
            delta_row = tl.load(delta_base + queries, mask=queries < stop, other=0.0)
            scores = dot_transposed(k_rows, q_rows, PRECISION)
            dp = dot_transposed(v_rows, do_rows, PRECISION)
            visible = _visible(queries, start, bounds + at, row_segments + rows)
            scores = tl.where(visible, scores * scale, float("-inf"))
            p, ds = _score_gradient(scores, LOG2_E, lse2[None, :], delta_row[None, :], dp)
            dv_sum = add_dot(p.to(v.dtype.element_ty), do_rows, dv_sum, PRECISION)
            dk_sum = add_dot(ds.to(k.dtype.element_ty), q_rows, dk_sum, PRECISION)
    dk_rows = rows_of(base_of(dk, dk_stride, batch, head, UNIT), dk_stride, rows, UNIT)
    store_rows(dk_rows, scale_rows(dk_sum, scale), here, D, PARTS)
    dv_rows = rows_of(base_of(dv, dv_stride, batch, head, UNIT), dv_stride, rows, UNIT)
    store_rows(dv_rows, dv_sum, here, D, PARTS)


def parts_of(head_dim: int) -> tuple[int, ...]:
    """Head dim as parts for the tensor cores, whose step is 16: 72 -> (64, 16)."""
    return split_width(head_dim, least=16, most=3)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 means fp32: no TF32 rounding of the operands. Ignored for half precision."""
    return "ieee" if dtype == torch.float32 else "tf32"


KERNELS = {
    "attention_forward": _forward,
    "attention_backward_dq": _backward_dq,
    "attention_backward_dkv": _backward_dkv,
}


@lru_cache(maxsize=1024)
def _prepare(
    name: str, q_shape: torch.Size, k_shape: torch.Size, strides_of: tuple[tuple[int, ...], ...], by_key: bool,
    like_k: tuple[bool, ...], dtype: torch.dtype, device: torch.device, segments: Segments, scale: float,
    extra: tuple[tuple[str, object], ...], config: tuple[tuple[str, int], ...],
) -> tuple[Launch, Schedule]:  # fmt: skip
    """The launch of kernel `name` for tensors of one shape and these strides; like_k: which have k's shape, not q's.

    (By name: the hash of a Triton kernel takes 2 us.)
    """
    B, H, T, D = q_shape
    kv_heads, k_tokens = k_shape[1:3]
    blocks, share = dict(config), H // kv_heads
    tables = schedule(segments, T, k_tokens, blocks["BLOCK_M"], blocks["BLOCK_N"], by_key, device)
    shapes = (k_shape if of_k else q_shape for of_k in like_k)
    unit, each = strides(*zip(shapes, strides_of, strict=True))
    constants = dict(config + extra) | {"D": D, "PARTS": parts_of(D), "UNIT": unit, "SHARE": share}
    constants |= {"HAS_MASKED": tables.has_masked, "PRECISION": precision_of(dtype)}
    # What a program reads beside its rows: keys and values, which `share` heads have in common, or the queries of all.
    heads, columns = (kv_heads, share * T) if by_key else (H, max(1, k_tokens // share))
    tiles = len(tables.items)
    sizes = heads, T, B * heads, heads_per_group(B * heads, 2 * columns * D * dtype.itemsize), tiles
    return Launch(KERNELS[name], (tiles * B * heads,), (*tables, *each, *sizes, scale), constants), tables


def _launch(
    name: str, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...], q: Tensor, k: Tensor,
    segments: Segments, scale: float, by_key: bool = False, constants: tuple[tuple[str, object], ...] = (),
) -> None:  # fmt: skip
    """Launch kernel `name`; it takes the strides of `strided`."""
    device, dtype, lengths = q.device, q.dtype, segments.q_lengths
    config = tuning.lookup(name, device, dtype, q.shape[-1], lengths[0] if len(lengths) == 1 else 0)
    like_k = tuple([x.shape == k.shape for x in strided])
    run, tables = _prepare(
        name, q.shape, k.shape, tuple([x.stride() for x in strided]), by_key, like_k, dtype, device, segments, scale,
        constants, tuple(config.items()),
    )  # fmt: skip
    keep_if_captured(tables)
    run(tensors)


@on_device
def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> None:
    """See backend.py."""
    tensors, size, sign = (q, k, v, out, lse), abs(scale) * LOG2_E.value, -1.0 if scale < 0 else 1.0
    _launch("attention_forward", tensors, tensors[:4], q, k, segments, size, constants=(("SIGN", sign),))


@on_device
def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, segments: Segments, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    delta = torch.empty_like(lse)
    query_tensors = grad_out, grad_lse, q, k, v, out, lse, delta, dq
    _launch("attention_backward_dq", query_tensors, (grad_out, q, k, v, out, dq), q, k, segments, scale)
    key_tensors = grad_out, q, k, v, lse, delta, dk, dv
    _launch("attention_backward_dkv", key_tensors, (grad_out, q, k, v, dk, dv), q, k, segments, scale, by_key=True)
