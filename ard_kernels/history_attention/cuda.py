"""History attention in CUDA C++: append (csrc/history_attention), attend (csrc/block_causal_attention), add splits up.

Two launches: the append, with the norms of q and k; attention over the cache, the new segment included. With few rows
(batch 1) several thread blocks share a query tile's keys, and a third launch adds their results up, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.cuda import aligned, refuses
from ard_kernels.block_causal_attention.tiles import heads_per_group
from ard_kernels.common import extension
from ard_kernels.common.gpu_support import keep_if_captured, multiprocessors, on_device
from ard_kernels.history_attention.norm import KINDS, HeadNorm
from ard_kernels.history_attention.splits import share_tiles
from ard_kernels.history_attention.tiles import schedule

__all__ = ["append", "forward", "refuses"]


def _aligned_parameter(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.is_contiguous() and parameter.data_ptr() % 16 == 0):
        return parameter
    return parameter.clone(memory_format=torch.contiguous_format)


def _fields(norm: HeadNorm | None) -> tuple | None:
    """`norm` as the extension takes it."""
    if norm is None:
        return None
    parameters = [
        (0, 0) if parameter is None else (parameter.data_ptr(), extension.dtype_code(parameter.dtype))
        for parameter in (norm.weight, norm.bias)
    ]
    return KINDS.index(norm.kind) + 1, *parameters[0], *parameters[1], norm.eps


def _from_token(cache: Tensor, start: int) -> tuple[int, int, int, int]:
    """heads_view of cache[:, :, start:]."""
    pointer, batch, head, token = extension.heads_view(cache)
    return pointer + start * token * cache.element_size(), batch, head, token


def append(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None,
) -> Tensor:  # fmt: skip
    """cache[:, :, start : start + L] = (k_norm(k), v); returns q_norm(q), rows on 16 bytes (q itself where it can)."""
    B, H, L, D = q.shape
    q, k, v = map(aligned, (q, k, v))
    normed_q = q if q_norm is None else q.new_empty(B, H, L, D)
    norms = [
        norm and HeadNorm(norm.kind, _aligned_parameter(norm.weight), _aligned_parameter(norm.bias), norm.eps)
        for norm in (q_norm, k_norm)
    ]
    extension.gpu(q.device).history_append(
        *map(extension.heads_view, (q, normed_q, k, v)), _from_token(cache_k, start), _from_token(cache_v, start),
        *map(_fields, norms), B, H, L, D, extension.dtype_code(q.dtype), extension.stream(q.device),
    )  # fmt: skip
    return normed_q


@on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, out: Tensor, workspace: Tensor,
    start: int, sink_stop: int, window_start: int, scale: float, q_norm: HeadNorm | None, k_norm: HeadNorm | None,
) -> None:  # fmt: skip
    """See backend.py; q and k are normalised by the append. Rows of the cache start on 16 bytes."""
    B, H, L, D = q.shape
    stop, device = start + L, q.device
    gpu, dtype, stream = extension.gpu(device), extension.dtype_code(q.dtype), extension.stream(device)
    q = append(q, k, v, cache_k, cache_v, start, q_norm, k_norm)
    made, columns = schedule(L, sink_stop, window_start, stop, *gpu.attention_history_block(D), device)
    tables = keep_if_captured(made)
    tiles = len(tables.items)
    group = heads_per_group(B * H, 2 * (sink_stop + stop - window_start) * D * q.element_size())
    splits, tiles_per_split = share_tiles(tiles * B * H, columns, multiprocessors(device))
    gpu.attention_history(
        *map(extension.heads_view, (q, cache_k, cache_v, out)),
        workspace.data_ptr(),
        (*(table.data_ptr() for table in tables), tiles, group),
        (B, H, H, L, stop), splits, tiles_per_split, scale, dtype, D, stream,
    )  # fmt: skip
    if splits > 1:
        gpu.history_add_splits(workspace.data_ptr(), extension.heads_view(out), B, H, L, D, splits, dtype, stream)
