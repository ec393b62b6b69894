"""Which attention calls the torch backend makes of a mask: index algebra, and the small masks of shared calls.

A call has the rows of a group of segments: one, whose call wastes no FLOP, or several short ones under a mask.
Block-diagonal masks over equal segments become one call by a batch reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.mask import Run, mask_of, merged
from ard_kernels.block_causal_attention.spec import Segments, visibility

# Segments shorter than ALONE share calls, GROUP tokens or more in each; longer ones have a call each. Measured with
# AVX2, fp32, 1 thread, forward + backward in ms by tokens of a group (first: a call per segment):
#   L=1  S=4096 B=1 H=4  D=64   > 2500 | 32: 788 | 64: 656 | 128: 646 | 256: 608 | one mask: 1316
#   L=16 S=4    B=16 H=16 D=72      44 | 32:  39 | 64:  34 (one mask)
#   L=16 S=4    B=64 H=4  D=16    12.1 | 32: 11.7 | 64: 8.7 (one mask)
#   L=32 S=16   B=4 H=8 D=64 w=4    47 |           64:  56 | 128: 61
#   L=64 S=4    B=1 H=16  D=72      18 |                     128: 21 | 256: 29
ALONE, GROUP = 32, 64
MOST_KEPT_PAIRS = 1 << 20  # masks of 4 MiB in fp32 are kept for the next call of their shape; larger ones are made anew

TokenRanges = list[Run]


class Block(NamedTuple):
    """One attention call: the queries of one or several segments (backward: the keys), and what any of them sees."""

    rows: Run
    columns: TokenRanges  # backward: one
    make_mask: Callable[[], Tensor] | None  # of 0 and -inf, (queries, keys); None: all rows see all columns

    def mask(self) -> Tensor | None:
        return None if self.make_mask is None else self.make_mask()


class Plan(NamedTuple):
    """How to run one shape; made once, since tiny ones would notice."""

    folded: Run | None  # tokens of a query and a key segment where a block-diagonal mask is one call on a batch of them
    forward: list[Block]
    backward: list[Block]


def _groups(offsets: Sequence[int], alone: Sequence[bool]) -> list[Run]:
    """[first, stop) segments that share a call."""
    groups: list[Run] = []
    first = 0
    for stop in range(1, len(offsets)):
        if alone[stop - 1] and first < stop - 1:
            groups.append((first, stop - 1))
            first = stop - 1
        if alone[stop - 1] or offsets[stop] - offsets[first] >= GROUP or stop == len(offsets) - 1:
            groups.append((first, stop))
            first = stop
    return groups


def _additive_mask(
    offsets: Sequence[int], ranges: Sequence[TokenRanges], columns: TokenRanges, like: Tensor, by_key: bool
) -> Tensor:
    """(rows, columns) of 0 and -inf, by_key (columns, rows), for rows of the segments `offsets` that see `ranges`."""
    (first, _), (_, last) = columns[0], columns[-1]
    mask = like.new_full((offsets[-1] - offsets[0], last - first), float("-inf"))
    for (start, stop), own in zip(pairwise(offsets), ranges, strict=True):
        for a, b in own:
            mask[start - offsets[0] : stop - offsets[0], max(a - first, 0) : max(b - first, 0)] = 0
    mask = torch.cat([mask[:, a - first : b - first] for a, b in columns], 1)
    return mask.T.contiguous() if by_key else mask


def _blocks(
    offsets: Sequence[int], ranges: Sequence[TokenRanges], grouped: bool, by_key: bool, like: Tensor
) -> list[Block]:
    """The calls for what each segment sees; those by key have one range of queries each. `like`: the mask's tensor."""
    blocks: list[Block] = []
    pairs = 0
    alone = [
        not (grouped and own) or stop - start >= ALONE
        for (start, stop), own in zip(pairwise(offsets), ranges, strict=True)
    ]
    for first, stop in _groups(offsets, alone):
        rows, own = (offsets[first], offsets[stop]), ranges[first:stop]
        alike = all([each == own[0] for each in own])
        union = merged([each for seen in own for each in seen])
        for columns in [[each] for each in union] if by_key and union else [union]:
            make: Callable[[], Tensor] | None = None
            if not alike:
                pairs += (rows[1] - rows[0]) * sum(b - a for a, b in columns)
                make = partial(_additive_mask, offsets[first : stop + 1], own, columns, like, by_key)
            blocks.append(Block(rows, columns, make))
    if pairs > MOST_KEPT_PAIRS:
        return blocks
    return [block if block.make_mask is None else block._replace(make_mask=cache(block.make_mask)) for block in blocks]


@lru_cache(maxsize=64)
def make_plan(
    q_tokens: int, k_tokens: int, dtype: torch.dtype, device: torch.device, segments: Segments, grouped: bool
) -> Plan:
    """grouped: whether segments may share a call under a mask."""
    seen = visibility(segments, q_tokens, k_tokens)
    count = len(seen.q_offsets) - 1
    diagonal = mask_of(segments.mask, count).runs == tuple([((i, i + 1),) for i in range(count)])
    sides = (pairwise(offsets) for offsets in (seen.q_offsets, seen.k_offsets))
    lengths = {(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(*sides, strict=False)}
    if diagonal and len(lengths) == 1 and len(seen.k_offsets) == len(seen.q_offsets):
        return Plan(lengths.pop(), [], [])
    like = torch.empty(0, dtype=dtype, device=device)
    return Plan(
        None,
        _blocks(seen.q_offsets, seen.keys, grouped, False, like),
        _blocks(seen.k_offsets, seen.queries, grouped, True, like),
    )
