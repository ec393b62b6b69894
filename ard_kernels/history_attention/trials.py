"""What attention to a cache is checked with: one that grows, one that rolls, calls that keep nothing, a sink query."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ard_kernels.common.arguments import check_scale
from ard_kernels.common.self_check import Draw, Tensors, Trial, Unit
from ard_kernels.history_attention.cache import HistoryCache
from ard_kernels.history_attention.op import OP, history_op

B, HEADS, KV_HEADS = 2, 4, 2


def _steps(
    backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None, sink: int,
    sink_query: bool,
) -> Tensors:  # fmt: skip
    """Every step's output, of a call that keeps nothing and one that does, and what the cache then holds."""
    settings = (B, KV_HEADS, q.shape[-1]), (q.dtype, q.device)
    if window is None:
        cache = HistoryCache(1, *settings[0], sum(lengths), *settings[1])
    else:
        cache = HistoryCache.rolling(
            1, *settings[0], segment_length=lengths[0], window=window, sink=sink, dtype=q.dtype, device=q.device
        )
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    memory = cache.keys, cache.values, cache.workspace, cache.positions
    outputs, start = {}, 0
    for step, length in enumerate(lengths):
        own = [x[:, :, start : start + length] for x in (q, k, v)]
        q_sink = own[0].flip(-1) if sink_query else None
        for commit in (False, True):
            rest = 0, window, sink, check_scale(OP, None, q.shape[-1]), commit, backend
            outputs[f"step {step}{', kept' * commit}"] = history_op(*own, q_sink, *memory, *rest)
        start += length
    return outputs | {"keys": cache.keys.nan_to_num(), "values": cache.values.nan_to_num()}


def trials(draw: Draw, dtype: torch.dtype, head_dim: int) -> Iterator[Trial]:
    """Without gradients: a call with one goes through the kernels of segment_attention."""
    calls = (
        ("a cache that grows", (100, 28, 1, 64), None, 0, False),
        ("a rolling cache", (40,) * 6, 2, 1, False),
        ("a rolling cache, sink query", (40,) * 5, 2, 1, True),
    )
    for label, lengths, window, sink, sink_query in calls:
        packed = draw(B, sum(lengths), HEADS + 2 * KV_HEADS, head_dim, dtype=dtype)
        parts = [x.transpose(1, 2) for x in packed.split([HEADS, KV_HEADS, KV_HEADS], 2)]
        run = partial(_steps, lengths=lengths, window=window, sink=sink, sink_query=sink_query)
        yield Trial(label, dict(zip("qkv", parts, strict=True)), run, gradients=False)


UNIT = Unit(OP, trials, (64, 72, 128))
