"""History attention with a gradient: the last denoising call of self-rollout training (arXiv 2506.08009).

The own segment's q, k, v are differentiated; what the cache holds of earlier segments is a constant. It is copied, so
that the gradient is right whatever becomes of the cache before it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.block_causal_attention import SegmentMask, segment_attention
from ard_kernels.block_causal_attention.mask import merged
from ard_kernels.common.library import private
from ard_kernels.history_attention import torch_impl
from ard_kernels.history_attention.cache import HistoryCache
from ard_kernels.history_attention.norm import HeadNorm, normalise
from ard_kernels.history_attention.spec import advance, next_offsets, refuse_recomputation, visible_tokens

WHOLE = SegmentMask([[True]])


def attend_with_gradient(
    q: Tensor, k: Tensor, v: Tensor, cache: HistoryCache, layer: int, window: int | None, sink: int, scale: float,
    q_norm: HeadNorm | None, k_norm: HeadNorm | None, backend: str,
) -> Tensor:  # fmt: skip
    """out (B, H, L, D) of checked inputs; appends k and v when nothing can fail any more."""
    refuse_recomputation("history_attention")
    places, (layers, _, _, capacity, _) = cache.positions.numpy(), cache.keys.shape
    offsets = next_offsets("history_attention", places, layers, capacity, layer, k.shape[2])
    sink_stop, window_start = visible_tokens(offsets, window, sink)
    start, past = offsets[-2], merged([(0, sink_stop), (window_start, offsets[-2])])
    q, k = normalise(q, q_norm), normalise(k, k_norm)
    keys, values = (
        torch.cat([*(held[layer, :, :, a:b] for a, b in past), own], 2)
        for held, own in ((cache.keys, k), (cache.values, v))
    )
    # PyTorch's attention serves the backend whose kernel is an append.
    attention = "torch" if backend == "cpu" else backend
    lengths = q.shape[2], keys.shape[2]
    out = segment_attention(
        q, keys, values, WHOLE, segment_length=lengths[0], key_segment_length=lengths[1], scale=scale, backend=attention
    )
    with torch.no_grad():
        torch_impl.append(k, v, cache.keys[layer], cache.values[layer], start)
    advance(places, layers, layer, offsets)
    return out


# How much of the cache is seen, and so the shapes, is read when it runs: no graph can hold it. torch.compiler.disable
# would import the compiler with this module.
_keep_out_of_graphs = private("_compile._disable_dynamo") or torch.compiler.disable
attend_outside_of_graphs = _keep_out_of_graphs(attend_with_gradient)
