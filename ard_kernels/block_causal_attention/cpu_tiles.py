"""The tiles of attention on the CPU: which rows lie along the lanes together, and which keys they see. Index algebra.

    tiles   (start, stop, first piece, last + 1)    up to TILE_ROWS rows; its keys are its pieces, in order
    pieces  (start, stop, unseen)                   keys that the same rows of a tile see; unseen: where in the list of
                                                    that name its TILE_ROWS entries begin, -1: every row sees them
    unseen  -1 for a row that does not see the keys, else 0

Row tiles either start anew at every segment, so that every row sees every key of its tile, or run across segments:
whichever computes fewer pairs of a lane and a key. Lanes come LANE_STEP at a time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.block_causal_attention.spec import Segments, visibility
from ard_kernels.block_causal_attention.tiles import seen_pieces

TILE_ROWS, LANE_STEP = 64, 16  # kTileRows and kLaneStep of cpu_params.h


class Tiles(NamedTuple):
    tiles: list[tuple[int, int, int, int]]
    pieces: list[tuple[int, int, int]]
    unseen: list[int]

    @property
    def cost(self) -> int:
        """Pairs of a lane and a key."""
        lanes = [-(-(stop - start) // LANE_STEP) * LANE_STEP for start, stop, _, _ in self.tiles]
        keys = [sum([b - a for a, b, _ in self.pieces[first:last]]) for _, _, first, last in self.tiles]
        return sum([n * each for n, each in zip(lanes, keys, strict=True)])


def tiles_of(offsets: Sequence[int], ranges: Sequence[Sequence[Run]], across: bool) -> Tiles:
    """The tiles of rows of segments `offsets` that see `ranges`, across segments or not."""
    made = Tiles([], [], [])
    masks: dict[tuple[int, ...], int] = {}
    whole: dict[int, tuple[int, int]] = {}  # the pieces of tiles within a segment, which share them
    begins = [0, offsets[-1]] if across else offsets
    cuts = [
        (start, min(start + TILE_ROWS, stop))
        for begin, stop in pairwise(begins)
        for start in range(begin, stop, TILE_ROWS)
    ]
    for start, stop in cuts:
        first, last = bisect_right(offsets, start) - 1, bisect_left(offsets, stop)
        if last - first == 1 and first in whole:
            made.tiles.append((start, stop, *whole[first]))
            continue
        ends = [min(end, stop) - max(begin, start) for begin, end in pairwise(offsets[first : last + 1])]
        first_piece = len(made.pieces)
        for a, b, holders in seen_pieces(ranges[first:last]):
            at = -1
            if len(holders) < last - first:
                mask = [-(i not in holders) for i, rows in enumerate(ends) for _ in range(rows)]
                key = tuple(mask + [0] * (TILE_ROWS - len(mask)))
                at = masks.setdefault(key, len(made.unseen))
                if at == len(made.unseen):
                    made.unseen.extend(key)
            made.pieces.append((a, b, at))
        made.tiles.append((start, stop, first_piece, len(made.pieces)))
        if last - first == 1:
            whole[first] = made.tiles[-1][2:]
    return made


@lru_cache(maxsize=1024)
def make_tiles(segments: Segments, q_tokens: int, k_tokens: int, whole: bool) -> Tiles:
    """The tiles of a mask. whole: only those whose rows see all of their keys."""
    seen = visibility(segments, q_tokens, k_tokens)
    aligned = tiles_of(seen.q_offsets, seen.keys, across=False)
    if whole:
        return aligned
    return min(aligned, tiles_of(seen.q_offsets, seen.keys, across=True), key=lambda tiles: tiles.cost)
