"""History attention in CUDA C++: append (csrc/history_attention), attend (csrc/block_causal_attention), add splits up.

Two launches: the append; attention over the cache, the new segment included. With few rows (batch 1) several thread
blocks share a query tile's keys, and a third launch adds their results up, in order.
"""

from __future__ import annotations

from torch import Tensor

from ard_kernels.block_causal_attention.cuda import aligned, refuses
from ard_kernels.block_causal_attention.tiles import heads_per_group
from ard_kernels.common import extension
from ard_kernels.common.gpu_support import keep_if_captured, multiprocessors, on_device
from ard_kernels.history_attention.places import Place
from ard_kernels.history_attention.splits import share_tiles
from ard_kernels.history_attention.tiles import schedule

__all__ = ["append", "forward", "refuses"]


def _from_token(cache: Tensor, start: int) -> tuple[int, int, int, int]:
    """heads_view of cache[:, :, start:]."""
    pointer, batch, head, token = extension.heads_view(cache)
    return pointer + start * token * cache.element_size(), batch, head, token


@on_device
def append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int) -> None:
    """cache[:, :, start : start + L] = (k, v). Rows of the cache start on 16 bytes."""
    B, H_kv, L, D = k.shape
    k, v = aligned(k), aligned(v)
    views = *map(extension.heads_view, (k, v)), _from_token(cache_k, start), _from_token(cache_v, start)
    dtype, stream = extension.dtype_code(k.dtype), extension.stream(k.device)
    extension.gpu(k.device).history_append(*views, B, H_kv, L, D, dtype, stream)


@on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
    place: Place, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    B, H, L, D = q.shape
    runs, H_kv, device = place.runs, k.shape[1], q.device
    gpu, dtype, stream = extension.gpu(device), extension.dtype_code(q.dtype), extension.stream(device)
    append(k, v, cache_k, cache_v, place.start)
    q = aligned(q)
    made, columns = schedule(L, tuple(runs), *gpu.attention_history_block(D), device)
    tables = keep_if_captured(made)
    tiles = len(tables.items)
    group = heads_per_group(B * H, 2 * sum(stop - start for start, stop in runs) * D * q.element_size())
    splits, tiles_per_split = share_tiles(tiles * B * H, columns, multiprocessors(device))
    gpu.attention_history(
        *map(extension.heads_view, (q, cache_k, cache_v, out)),
        workspace.data_ptr(),
        (*(table.data_ptr() for table in tables), tiles, group),
        (B, H, H_kv, L, runs[-1][1]), splits, tiles_per_split, scale, dtype, D, stream,
    )  # fmt: skip
    if splits > 1:
        gpu.history_add_splits(workspace.data_ptr(), extension.heads_view(out), B, H, L, D, splits, dtype, stream)
