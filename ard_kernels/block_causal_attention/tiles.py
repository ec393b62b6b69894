"""The tile schedule of the GPU kernels: which column tiles each row tile visits, in which order. Index algebra only.

Forward and dQ: rows are queries, columns keys. dK and dV: rows are keys, columns the queries that see them. A row tile
visits *full* column tiles, which every one of its rows sees whole, without any mask arithmetic; then *masked* ones.

    items         (tiles, 8)  row start, row stop, first run's start and tiles, second run's start and tiles (the full
                              tiles of the two longest runs), first and last + 1 of its entries in `masked`
    masked        (n, 4)      column start and stop: no row sees columns of the tile at or past stop; `at`: the bounds
                              of a row of segment s are bounds[at + s]; 0
    bounds        (m,)        what a row sees of a masked tile, columns counted from its start: those below
                              bounds & 1023, and from bounds >> 10 & 1023 on those below bounds >> 20
    row_segments  (T,)        segment of each row

The last two have a tile's rows more: kernels look up the rows of a whole tile.

Row tiles of the same segments share their masked entries. Every row tile has a column tile: one that sees nothing has a
masked one without columns. Tiles with the most column tiles come first, so that the last wave of thread blocks is a
short one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ard_kernels.block_causal_attention.mask import Run, merged
from ard_kernels.block_causal_attention.spec import Segments, visibility
from ard_kernels.common.gpu_support import upload

# Heads whose keys and values fit in half of an H100's 50 MB of L2 are worked on together, tile by tile; the next group
# starts when they are done. Without groups (all heads' longest tile first) K and V would come from HBM for every tile.
GROUP_BYTES = 24 << 20

BOUND_BITS = 10  # three of them are one int32; a tile has fewer than 1 << BOUND_BITS columns


class Tables(NamedTuple):
    """Of one mask at one tile size, as NumPy arrays (see the module's docstring)."""

    items: np.ndarray
    masked: np.ndarray
    bounds: np.ndarray
    row_segments: np.ndarray


class Schedule(NamedTuple):
    """`Tables` on a device."""

    items: torch.Tensor
    masked: torch.Tensor
    bounds: torch.Tensor
    row_segments: torch.Tensor

    @property
    def has_masked(self) -> bool:
        return len(self.masked) > 0


def column_tiles(items: np.ndarray) -> np.ndarray:
    """(tiles,) column tiles that each row tile visits."""
    return items[:, 3] + items[:, 5] + items[:, 7] - items[:, 6]


def heads_per_group(batch_heads: int, bytes_per_head: int) -> int:
    """(batch, head) pairs whose tiles are interleaved; near equal groups: a small last one would end on long tiles."""
    most = max(1, GROUP_BYTES // max(1, bytes_per_head))
    groups = -(-batch_heads // most)
    return -(-batch_heads // groups)


def seen_pieces(ranges: Sequence[Sequence[Run]]) -> Iterator[tuple[int, int, frozenset[int]]]:
    """Columns that some of `ranges` holds, cut where those who hold them change: (start, stop, which of them)."""
    if len(ranges) == 1:
        for start, stop in ranges[0]:
            yield start, stop, frozenset((0,))
        return
    changes: dict[int, set[int]] = {}
    for i, own in enumerate(ranges):
        for run in own:
            for end in run:
                changes.setdefault(end, set()).symmetric_difference_update((i,))
    holders: frozenset[int] = frozenset()
    for start, stop in pairwise(sorted(changes)):
        holders ^= changes[start]
        if holders:
            yield start, stop, holders


def _pieces(ranges: Sequence[Sequence[Run]]) -> list[tuple[int, int, bool]]:
    """Columns that some of `ranges` holds, cut where all or not all do: (start, stop, all of them), merged."""
    pieces: list[tuple[int, int, bool]] = []
    for start, stop, holders in seen_pieces(ranges):
        full = len(holders) == len(ranges)
        if pieces and pieces[-1][1] == start and pieces[-1][2] == full:
            start = pieces.pop()[0]
        pieces.append((start, stop, full))
    return pieces


def tile_runs(pieces: Sequence[tuple[int, int, bool]], block: int) -> tuple[list[int], list[Run]]:
    """The full tiles as two runs, [start, tiles] x 2 flat, and the columns left for masked tiles, in order."""
    tiles_of = [(stop - start) // block if full else 0 for start, stop, full in pieces]
    longest = sorted(range(len(pieces)), key=lambda i: -tiles_of[i])[:2]
    runs: list[int] = []
    rest: list[Run] = []
    for i, (start, stop, _) in enumerate(pieces):
        if i in longest and tiles_of[i]:
            runs += [start, tiles_of[i]]
            start += tiles_of[i] * block
        rest.append((start, stop))
    return runs + [0] * (4 - len(runs)), merged(rest)


def packed_bounds(first_stop: int, start: int, stop: int) -> int:
    """An entry of `bounds`."""
    return first_stop | start << BOUND_BITS | stop << 2 * BOUND_BITS


def _near(ranges: Sequence[Run], start: int, stop: int) -> Sequence[Run]:
    """Those of `ranges` that may reach into start .. stop."""
    return ranges[max(0, bisect_right(ranges, (start,)) - 1) : bisect_left(ranges, (stop,))]


def _bounds(tile: int, stop: int, ranges: Sequence[Run]) -> int | None:
    """What a row that sees `ranges` sees of the columns tile .. stop; None when it takes more than two intervals."""
    inside = [(max(a, tile) - tile, min(b, stop) - tile) for a, b in _near(ranges, tile, stop)]
    inside = [(a, b) for a, b in inside if a < b]
    if len(inside) == 2 and inside[0][0] == 0:
        return packed_bounds(inside[0][1], *inside[1])
    return None if len(inside) > 1 else packed_bounds(0, *inside[0]) if inside else 0


def masked_tiles(rest: Sequence[Run], ranges: Sequence[Sequence[Run]], block: int) -> list[tuple[Run, list[int]]]:
    """The masked tiles over the columns `rest`: (start, stop), and the bounds of each segment's rows.

    A tile ends early where a row would see more of it than two intervals.
    """
    tiles: list[tuple[Run, list[int]]] = []
    for start, end in rest:
        while start < end:
            stop = min(start + block, end)
            each = [_bounds(start, stop, own) for own in ranges]
            while None in each:  # the last place where what some row sees begins or ends
                stop = max(
                    cut for own in ranges for run in _near(own, start, stop) for cut in run if start < cut < stop
                )
                each = [_bounds(start, stop, own) for own in ranges]
            if any(each):
                tiles.append(((start, stop), [bounds or 0 for bounds in each]))
            start = stop
    return tiles


class _Builder:
    """Tables for one way to cut the rows."""

    def __init__(self, offsets: Sequence[int], ranges: Sequence[Sequence[Run]], block: int):
        self.offsets, self.ranges, self.block = offsets, ranges, block
        self.masked: list[tuple[int, int, int, int]] = []
        self.bounds: list[int] = []
        self.known: dict[Run, tuple[int, ...]] = {}

    def columns(self, segments: Run) -> tuple[int, ...]:
        """The last six fields of an item whose rows are of these segments."""
        if segments not in self.known:
            first, last = segments
            ranges = self.ranges[first:last]
            runs, rest = tile_runs(_pieces(ranges), self.block)
            tiles = masked_tiles(rest, ranges, self.block)
            if not tiles and not runs[1]:
                tiles = [((0, 0), [0] * len(ranges))]
            begin = len(self.masked)
            for (start, stop), bounds in tiles:
                self.masked.append((start, stop, len(self.bounds) - first, 0))
                self.bounds += bounds
            self.known[segments] = (*runs, begin, len(self.masked))
        return self.known[segments]

    def tables(self, cuts: Sequence[Run]) -> tuple[np.ndarray, ...]:
        """items, longest first, masked and bounds for the row tiles `cuts`."""
        rows = [
            (start, stop, *self.columns((bisect_right(self.offsets, start) - 1, bisect_left(self.offsets, stop))))
            for start, stop in cuts
        ]
        items = np.array(rows, np.int32).reshape(-1, 8)
        longest_first = np.argsort(-column_tiles(items), kind="stable")
        return items[longest_first], np.array(self.masked, np.int32).reshape(-1, 4), np.array(self.bounds, np.int32)


def make_tables(
    segments: Segments, q_tokens: int, k_tokens: int, block_rows: int, block_columns: int, by_key: bool
) -> Tables:
    """The tables as the module's docstring says.

    Row tiles either start anew at every segment, or run across segments: whichever visits fewer column tiles.
    """
    seen = visibility(segments, q_tokens, k_tokens)
    offsets, ranges = (seen.k_offsets, seen.queries) if by_key else (seen.q_offsets, seen.keys)
    tokens = offsets[-1]
    aligned = [
        (start, min(start + block_rows, stop))
        for begin, stop in pairwise(offsets)
        for start in range(begin, stop, block_rows)
    ]
    across = [(start, min(start + block_rows, tokens)) for start in range(0, tokens, block_rows)]
    choices = [_Builder(offsets, ranges, block_columns).tables(cuts) for cuts in (aligned, across)]
    items, masked, bounds = min(choices, key=lambda tables: int(column_tiles(tables[0]).sum()))
    row_segments = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    return Tables(items, masked, np.pad(bounds, (0, block_rows)), np.pad(row_segments, (0, block_rows), "edge"))


def useful_share(segments: Segments, q_tokens: int, k_tokens: int, block: tuple[int, int], by_key: bool) -> float:
    """Share of the (row, column) pairs of all visited tiles that the mask keeps: what a launch's FLOPs are good for."""
    items = make_tables(segments, q_tokens, k_tokens, *block, by_key).items
    return visibility(segments, q_tokens, k_tokens).pairs / (int(column_tiles(items).sum()) * block[0] * block[1])


@lru_cache(maxsize=1024)
def schedule(
    segments: Segments,
    q_tokens: int,
    k_tokens: int,
    block_rows: int,
    block_columns: int,
    by_key: bool,
    device: torch.device,
) -> Schedule:
    """The tables on `device`; made once."""
    tables = make_tables(segments, q_tokens, k_tokens, block_rows, block_columns, by_key)
    return Schedule(*(upload(table, device) for table in tables))
