"""History attention over a copy of what is visible: with a gradient, or of several new segments at once.

With a gradient it is the last denoising call of self-rollout training (arXiv 2506.08009): the own segment's q, k, v are
differentiated, what the cache holds of earlier segments is a constant. The copy makes the gradient right whatever
becomes of the cache before it is asked for; and later ones of several new segments may take the slots of earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ard_kernels.block_causal_attention import SegmentMask, merge_attention, segment_attention
from ard_kernels.block_causal_attention.mask import first_window_segment
from ard_kernels.common.library import forward_mode, private
from ard_kernels.history_attention import places, torch_impl
from ard_kernels.history_attention.cache import HistoryCache
from ard_kernels.history_attention.op import OP
from ard_kernels.history_attention.spec import check_apart, refuse_recomputation


def attend_to_copy(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, cache: HistoryCache, layer: int, lengths: Sequence[int],
    window: int | None, sink: int, scale: float, commit: bool, backend: str,
) -> Tensor:  # fmt: skip
    """out (B, H, T, D) of new segments of `lengths` tokens; the cache is written when nothing can fail any more."""
    refuse_recomputation(OP)
    inputs = (q, k, v) if q_sink is None else (q, k, v, q_sink)
    if type(cache.positions) is not Tensor:
        raise NotImplementedError(f"{OP}: what is seen depends on the cache's positions; expected no fake tensors")
    if forward_mode() and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"ard_kernels: {OP} has no forward-mode derivative")
    check_apart(OP, inputs, cache.keys, cache.values)
    counts, (layers, _, _, capacity, _) = cache.positions.numpy(), cache.keys.shape
    at = places.stand(OP, counts, layers, capacity, layer, lengths, window, sink)
    first, stop = at.taken, at.taken + len(lengths)
    in_window = first_window_segment(first, window)
    past = [*range(min(sink, in_window)), *range(in_window, first)]
    held = [at.tokens(j) for j in past]
    keys, values = (
        torch.cat([*(rows[layer, :, :, a:b] for a, b in held), own], 2)
        for rows, own in ((cache.keys, k), (cache.values, v))
    )
    key_lengths = [*(b - a for a, b in held), *lengths]
    shared: dict[str, Any] = {"scale": scale, "return_lse": True, "backend": backend}
    shared |= {"segment_length": list(lengths), "key_segment_length": key_lengths}

    def attend(query: Tensor, mask: list[list[bool]]) -> tuple[Tensor, Tensor]:
        return segment_attention(query, keys, values, SegmentMask(mask), **shared)

    rows, columns = range(first, stop), [*past, *range(first, stop)]
    of_sink = [[j < min(sink, i) for j in columns] for i in rows]
    seen = [[first_window_segment(i, window) <= j <= i or j < min(sink, i) for j in columns] for i in rows]
    if q_sink is None or not any(map(any, of_sink)):
        out = attend(q, seen)[0]
    else:
        rest = [[b and not a for a, b in zip(*pair, strict=True)] for pair in zip(of_sink, seen, strict=True)]
        out = merge_attention(*zip(attend(q_sink, of_sink), attend(q, rest), strict=True))[0]
    if commit:
        places.overwrite(counts, at, len(lengths))
        with torch.no_grad():
            for i, (a, b) in zip(rows, pairwise(accumulate(lengths, initial=0)), strict=True):
                start = at.tokens(i)[0]
                torch_impl.append(k[:, :, a:b], v[:, :, a:b], cache.keys[layer], cache.values[layer], start)
        places.advance(counts, layers, layer, at, len(lengths))
    return out


# How much of the cache is seen, and so the shapes, is read when it runs: no graph can hold it. torch.compiler.disable
# would import the compiler with this module.
_keep_out_of_graphs = private("_compile._disable_dynamo") or torch.compiler.disable
attend_outside_of_graphs = _keep_out_of_graphs(attend_to_copy)
