"""The tables of history attention in CUDA: what block_causal_attention/tiles.py describes, for one new segment.

Rows are the L new queries, of one segment; columns the tokens of the cache; all rows see the same one or two runs of
them. A full run's last columns that fill no tile are a masked one. Index algebra only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.block_causal_attention.tiles import Schedule, Tables, column_tiles, masked_tiles, tile_runs
from ard_kernels.common.gpu_support import upload


def make_tables(rows: int, seen: Sequence[Run], block_rows: int, block_columns: int) -> Tables:
    """The tables for `rows` queries that see these runs, ascending and apart."""
    runs, rest = tile_runs([(*run, True) for run in seen], block_columns)
    tiles = masked_tiles(rest, [list(seen)], block_columns)
    items = [(row, min(row + block_rows, rows), *runs, 0, len(tiles)) for row in range(0, rows, block_rows)]
    masked = [(*columns, i, 0) for i, (columns, _) in enumerate(tiles)]
    bounds = [own for _, (own,) in tiles]
    return Tables(
        np.array(items, np.int32).reshape(-1, 8),
        np.array(masked, np.int32).reshape(-1, 4),
        np.array(bounds, np.int32),
        np.zeros(rows + block_rows, np.int32),
    )


@lru_cache(maxsize=1024)
def schedule(
    rows: int, seen: tuple[Run, ...], block_rows: int, block_columns: int, device: torch.device
) -> tuple[Schedule, int]:
    """The tables on `device`, and the column tiles of each row tile; made once per step of a sampler."""
    tables = make_tables(rows, seen, block_rows, block_columns)
    return Schedule(*(upload(table, device) for table in tables)), int(column_tiles(tables[0])[0])
