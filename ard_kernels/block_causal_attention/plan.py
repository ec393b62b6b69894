"""Which attention calls the torch backend makes of a mask: index algebra.

A call has the rows of one segment and what they see: it wastes no FLOP and needs no mask. Block-diagonal masks over
equal segments become one call by a batch reshape.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ard_kernels.block_causal_attention.mask import Run, mask_of
from ard_kernels.block_causal_attention.spec import Segments, visibility

Block = tuple[Run, list[Run]]  # the rows of a segment, and the columns that they see


class Plan(NamedTuple):
    """How to run one shape; made once, since tiny ones would notice."""

    folded: Run | None  # tokens of a query and a key segment where a block-diagonal mask is one call on a batch of them
    by_query: list[Block]
    by_key: list[Block]


@lru_cache(maxsize=64)
def make_plan(q_tokens: int, k_tokens: int, segments: Segments) -> Plan:
    seen = visibility(segments, q_tokens, k_tokens)
    count = len(seen.q_offsets) - 1
    diagonal = mask_of(segments.mask, count).runs == tuple([((i, i + 1),) for i in range(count)])
    q_rows, k_rows = (list(pairwise(offsets)) for offsets in (seen.q_offsets, seen.k_offsets))
    lengths = {(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(q_rows, k_rows, strict=False)}
    if diagonal and len(lengths) == 1 and len(k_rows) == len(q_rows):
        return Plan(lengths.pop(), [], [])
    by_query, by_key = (list(zip(*of, strict=True)) for of in ((q_rows, seen.keys), (k_rows, seen.queries)))
    return Plan(None, by_query, by_key)
