# mypy: allow-untyped-defs
"""History attention in Triton: append a segment to the cache and attend to what it may see, in one launch.

A program takes one query tile of one (batch, head). It reads earlier tokens from the cache and its own segment from k
and v, so that no program waits for another's append; the program of the tile's first split copies the tile's k and v
rows to the cache (the first query head of a group does). With few rows (batch 1) several programs share a tile's keys;
a second launch adds them up, in order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.block_causal_attention.triton_impl import (
    LOG2_E,
    base_of,
    online_softmax,
    parts_of,
    precision_of,
    rows_of,
)
from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import multiprocessors, on_device
from ard_kernels.common.triton_parts import (
    add_dot,
    add_rows,
    dot_transposed,
    load_rows,
    scale_rows,
    store_rows,
    zero_rows,
)
from ard_kernels.common.triton_support import Launch, strides
from ard_kernels.history_attention.places import Place
from ard_kernels.history_attention.splits import share_tiles

# See there: `start` must not compile anything anew. (SPLIT and EVEN do, once each: warm up with all S steps.)
RUNS = ["run_start", "run_stop", "next_start", "next_stop"]
SIZES = ["H", "GROUP", "L", "batch_heads", "tiles_per_split", "start", *RUNS, "splits"]


@triton.jit
def _attend_tile(
    q_rows, k_base, v_base, k_stride, v_stride, start, stop, scale, maximum, total, accumulators,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SIGN: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys start .. start + BLOCK_N below stop (all of them when EVEN)."""
    keys = start + tl.arange(0, BLOCK_N)
    k_rows = load_rows(rows_of(k_base, k_stride, keys, UNIT), keys < stop, D, PARTS, not EVEN)
    v_rows = load_rows(rows_of(v_base, v_stride, keys, UNIT), keys < stop, D, PARTS, not EVEN)
    scores = dot_transposed(q_rows, k_rows, PRECISION) * SIGN
    if EVEN:
        p, maximum, total, factor = online_softmax(scores, scale, maximum, total, False)
    else:
        scores = tl.where((keys < stop)[None, :], scores * scale, float("-inf"))
        p, maximum, total, factor = online_softmax(scores, 1.0, maximum, total, False)
    accumulators = scale_rows(accumulators, factor[:, None])
    return maximum, total, add_dot(p.to(v_base.dtype.element_ty), v_rows, accumulators, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _append_and_attend(
    q, k, v, cache_k, cache_v, out, workspace, q_stride, k_stride, v_stride, cache_k_stride, cache_v_stride, out_stride,
    H, GROUP, L, batch_heads, tiles_per_split, start, run_start, run_stop, next_start, next_stop, scale,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SIGN: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads * row tiles, splits). `scale` is |scale| * log2(e), SIGN its sign.

    Earlier tokens seen: run_start .. run_stop and next_start .. next_stop. GROUP query heads share a key head.
    """
    row_tiles, split = tl.cdiv(L, BLOCK_M), tl.program_id(1)
    batch_head = tl.program_id(0) // row_tiles
    batch, head = batch_head // H, batch_head % H
    rows = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < L
    kv_head = head // GROUP
    k_base, v_base = base_of(k, k_stride, batch, kv_head, UNIT), base_of(v, v_stride, batch, kv_head, UNIT)
    old_k = base_of(cache_k, cache_k_stride, batch, kv_head, UNIT)
    old_v = base_of(cache_v, cache_v_stride, batch, kv_head, UNIT)
    if (split == 0) & (head % GROUP == 0):
        new_k = load_rows(rows_of(k_base, k_stride, rows, UNIT), here, D, PARTS)
        store_rows(rows_of(old_k, cache_k_stride, start + rows, UNIT), new_k, here, D, PARTS)
        new_v = load_rows(rows_of(v_base, v_stride, rows, UNIT), here, D, PARTS)
        store_rows(rows_of(old_v, cache_v_stride, start + rows, UNIT), new_v, here, D, PARTS)

    q_rows = load_rows(rows_of(base_of(q, q_stride, batch, head, UNIT), q_stride, rows, UNIT), here, D, PARTS)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulators = zero_rows(BLOCK_M, PARTS)
    # Column tiles of all splits in one row: the two runs, own segment.
    run_tiles = tl.cdiv(run_stop - run_start, BLOCK_N)
    old_tiles = run_tiles + tl.cdiv(next_stop - next_start, BLOCK_N)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, old_tiles + tl.cdiv(L, BLOCK_N))
    for j in range(first, tl.minimum(last, old_tiles)):
        tile = tl.where(j < run_tiles, run_start + j * BLOCK_N, next_start + (j - run_tiles) * BLOCK_N)
        stop = tl.where(j < run_tiles, run_stop, next_stop)
        maximum, total, accumulators = _attend_tile(
            q_rows, old_k, old_v, cache_k_stride, cache_v_stride, tile, stop, scale, maximum, total, accumulators,
            D, PARTS, UNIT, SIGN, EVEN, PRECISION, BLOCK_N,
        )  # fmt: skip
    for j in range(tl.maximum(first, old_tiles) - old_tiles, last - old_tiles):
        maximum, total, accumulators = _attend_tile(
            q_rows, k_base, v_base, k_stride, v_stride, j * BLOCK_N, L, scale, maximum, total, accumulators,
            D, PARTS, UNIT, SIGN, EVEN, PRECISION, BLOCK_N,
        )  # fmt: skip

    if SPLIT:  # (splits, batch * heads * L) rows of output, maximum and total
        all_rows = batch_heads * L
        partial = (split * all_rows + batch_head * L).to(tl.int64) + rows
        store_rows(workspace + partial * D, accumulators, here, D, PARTS)
        statistics = workspace + tl.num_programs(1).to(tl.int64) * all_rows * D + partial * 2
        tl.store(statistics, maximum, mask=here)
        tl.store(statistics + 1, total, mask=here)
    else:
        out_rows = rows_of(base_of(out, out_stride, batch, head, UNIT), out_stride, rows, UNIT)
        store_rows(out_rows, scale_rows(accumulators, (1.0 / total)[:, None]), here, D, PARTS)


@triton.jit(do_not_specialize=SIZES)
def _add_splits(
    workspace, out, out_stride, H, L, batch_heads, splits,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of exp2(m - max m) * partial / sum of exp2(m - max m) * total."""
    row_tiles = tl.cdiv(L, BLOCK)
    batch_head = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * BLOCK + tl.arange(0, BLOCK)
    here = rows < L
    all_rows = batch_heads * L
    statistics = workspace + splits.to(tl.int64) * all_rows * D
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = zero_rows(BLOCK, PARTS)
    for split in range(0, splits):
        partial = (split * all_rows + batch_head * L).to(tl.int64) + rows
        part_maximum = tl.load(statistics + partial * 2, mask=here, other=0.0)
        part_total = tl.load(statistics + partial * 2 + 1, mask=here, other=1.0)
        part = load_rows(workspace + partial * D, here, D, PARTS)
        new = tl.maximum(maximum, part_maximum)
        old_factor, factor = tl.exp2(maximum - new), tl.exp2(part_maximum - new)
        total = total * old_factor + part_total * factor
        sums = add_rows(scale_rows(sums, old_factor[:, None]), scale_rows(part, factor[:, None]))
        maximum = new
    batch, head = batch_head // H, batch_head % H
    out_rows = rows_of(base_of(out, out_stride, batch, head, UNIT), out_stride, rows, UNIT)
    store_rows(out_rows, scale_rows(sums, (1.0 / total)[:, None]), here, D, PARTS)


@lru_cache(maxsize=1024)
def _prepare(
    shape: torch.Size, kv_shape: torch.Size, cache_shape: torch.Size, strides_of: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    grid: tuple[int, int], sign: float, even: bool, config: tuple[tuple[str, int], ...],
) -> tuple[Launch, Launch]:  # fmt: skip
    """The launches for these strides of q, out, k, v, cache_k, cache_v: attend, and add the splits up."""
    B, H, L, D = shape
    shapes = (shape,) * 2 + (kv_shape,) * 2 + (cache_shape,) * 2
    unit, (q, out, k, v, *cache) = strides(*zip(shapes, strides_of, strict=True))
    splits, shared = grid[1], {"D": D, "PARTS": parts_of(D), "UNIT": unit}
    constants = {"SIGN": sign, "EVEN": even, "SPLIT": splits > 1, "PRECISION": precision_of(dtype)}
    sizes = H, H // kv_shape[1], L, B * H
    attend = Launch(_append_and_attend, grid, (q, k, v, *cache, out, *sizes), constants | shared | dict(config))
    rows, add = (triton.cdiv(L, 16) * B * H,), {"BLOCK": 16, "num_warps": 4}
    return attend, Launch(_add_splits, rows, (out, H, L, B * H, splits), add | shared)


@on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
    place: Place, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    B, H, L, D = q.shape
    config = tuning.lookup("attention_history", q.device, q.dtype, D, L)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    row_tiles = -(-L // block_m) * B * H  # triton.cdiv takes 3 us
    past = place.past(L)
    runs = (*(stop - start for start, stop in past), L)
    column_tiles = sum([-(-run // block_n) for run in runs])
    splits, tiles_per_split = share_tiles(row_tiles, column_tiles, multiprocessors(q.device))
    strides_of = tuple([x.stride() for x in (q, out, k, v, cache_k, cache_v)])
    sign, even = -1.0 if scale < 0 else 1.0, not any([run % block_n for run in runs])
    shapes = q.shape, k.shape, cache_k.shape
    attend, add_splits = _prepare(
        *shapes, strides_of, q.dtype, (row_tiles, splits), sign, even, tuple(config.items())
    )  # fmt: skip
    ints = tiles_per_split, place.start, *past[0], *past[1], abs(scale) * LOG2_E.value
    attend((q, k, v, cache_k, cache_v, out, workspace), ints)
    if splits > 1:
        add_splits((workspace, out))
