"""The tile schedule of the GPU kernels: which column tiles each row tile visits, in which order. Index algebra only.

Forward and dQ: rows are queries, columns keys. dK and dV: rows are keys, columns the queries that see them. A row tile
visits *full* column tiles, which every one of its rows sees whole, without any mask arithmetic; then *masked* ones.

    items   (tiles, 8)  row start, row stop, first run's start and tiles, second run's start and tiles (the full tiles:
                        at most two runs, sink and window), first and last + 1 of its entries in `masked`
    masked  (n, 2)      column start and stop: columns of the tile at or past stop do not count
    bounds  (T, 3)      what a row sees: columns < bounds[0], and bounds[1] <= column < bounds[2]

Rows of a tile with the most column tiles come first, so that the last wave of thread blocks is a short one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ard_kernels.block_causal_attention.spec import key_ranges, query_range
from ard_kernels.common.gpu_support import upload
from ard_kernels.common.segments import segment_offsets

# Heads whose keys and values fit in half of an H100's 50 MB of L2 are worked on together, tile by tile; the next group
# starts when they are done. Without groups (all heads' longest tile first) K and V would come from HBM for every tile.
GROUP_BYTES = 24 << 20


class Schedule(NamedTuple):
    """Tables of one mask at one tile size (see the module's docstring)."""

    items: torch.Tensor
    masked: torch.Tensor
    bounds: torch.Tensor

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


def visible_ranges(offsets: Sequence[int], window: int | None, sink: int, by_key: bool) -> list[list[tuple[int, int]]]:
    """Per segment, the column ranges its rows see: at most two, in order."""
    segments = range(len(offsets) - 1)
    if by_key:
        return [[query_range(offsets, segment, window, sink)] for segment in segments]
    return [key_ranges(offsets, segment, window, sink) for segment in segments]


def row_bounds(offsets: Sequence[int], ranges: list[list[tuple[int, int]]]) -> np.ndarray:
    """`bounds` of the module's docstring."""
    per_segment = [(0, *own[0]) if len(own) == 1 else (own[0][1], *own[1]) for own in ranges]
    return np.repeat(np.array(per_segment, np.int32), np.diff(offsets), axis=0)


def _runs(ranges: list[list[tuple[int, int]]]) -> list[tuple[int, int, bool]]:
    """Columns that some segment sees, cut where who sees them changes: (start, stop, all segments see it), merged."""
    if len(ranges) == 1:
        return [(start, stop, True) for start, stop in ranges[0]]
    cuts = sorted({cut for own in ranges for pair in own for cut in pair})
    runs: list[tuple[int, int, bool]] = []
    for start, stop in pairwise(cuts):
        seen = sum(any(a <= start < b for a, b in own) for own in ranges)
        if seen == 0:
            continue
        full = seen == len(ranges)
        if runs and runs[-1][1] == start and runs[-1][2] == full:
            start = runs.pop()[0]
        runs.append((start, stop, full))
    return runs


def tile_runs(runs: list[tuple[int, int, bool]], block: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Full runs as [start, tiles] x 2 flat, and the masked tiles; what is left of a full run joins the run after it."""
    full: list[int] = []
    partial: list[tuple[int, int]] = []
    for start, stop, whole in runs:
        if whole:
            tiles = (stop - start) // block
            if tiles:
                full += [start, tiles]
            start += tiles * block
        if partial and partial[-1][1] == start:
            start = partial.pop()[0]
        if start < stop:
            partial.append((start, stop))
    masked = [(tile, stop) for start, stop in partial for tile in range(start, stop, block)]
    return full + [0] * (4 - len(full)), masked


def _tables(
    offsets: Sequence[int], ranges: list[list[tuple[int, int]]], cuts: list[tuple[int, int]], block: int
) -> tuple[np.ndarray, np.ndarray]:
    """items and masked for the row tiles `cuts`, longest first."""
    rows: list[tuple[int, ...]] = []
    masked: list[tuple[int, int]] = []
    known: dict[tuple[int, int], tuple] = {}
    for start, stop in cuts:
        segments = bisect_right(offsets, start) - 1, bisect_right(offsets, stop - 1)
        if segments not in known:
            full, partial = tile_runs(_runs(ranges[slice(*segments)]), block)
            known[segments] = (*full, len(masked), len(masked) + len(partial))
            masked += partial
        rows.append((start, stop, *known[segments]))
    items = np.array(rows, np.int32).reshape(-1, 8)
    longest_first = np.argsort(-column_tiles(items), kind="stable")
    return items[longest_first], np.array(masked, np.int32).reshape(-1, 2)


def make_tables(
    lengths: Sequence[int],
    tokens: int,
    window: int | None,
    sink: int,
    block_rows: int,
    block_columns: int,
    by_key: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(items, masked, bounds) as the module's docstring says.

    Row tiles either start anew at every segment, or run across segments: whichever visits fewer column tiles.
    """
    offsets = segment_offsets(lengths, tokens)
    ranges = visible_ranges(offsets, window, sink, by_key)
    aligned = [
        (start, min(start + block_rows, stop))
        for begin, stop in pairwise(offsets)
        for start in range(begin, stop, block_rows)
    ]
    across = [(start, min(start + block_rows, tokens)) for start in range(0, tokens, block_rows)]
    choices = [_tables(offsets, ranges, cuts, block_columns) for cuts in (aligned, across)]
    items, masked = min(choices, key=lambda tables: int(column_tiles(tables[0]).sum()))
    return items, masked, row_bounds(offsets, ranges)


@lru_cache(maxsize=1024)
def schedule(
    lengths: tuple[int, ...],
    tokens: int,
    window: int | None,
    sink: int,
    block_rows: int,
    block_columns: int,
    by_key: bool,
    device: torch.device,
) -> Schedule:
    """The tables on `device`; made once."""
    tables = make_tables(lengths, tokens, window, sink, block_rows, block_columns, by_key)
    return Schedule(*(upload(table, device) for table in tables))
