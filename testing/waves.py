"""How long a launch of the attention kernels lasts on a GPU, by its tile schedule alone: thread blocks in launch order,
each taken by the next free slot (multiprocessors x resident blocks), lasting as long as it visits column tiles.

Thread blocks of one launch start in order of their number on every NVIDIA GPU seen so far, though no one promises it.
"""

from __future__ import annotations

import heapq

import numpy as np

from ard_kernels.block_causal_attention.spec import block_causal
from ard_kernels.block_causal_attention.tiles import column_tiles, make_tables
from ard_kernels.block_causal_attention.triton_impl import head_of

# A thread block's fixed cost (launch, first loads, last stores), in column tiles.
FIXED_TILES = 1.0


def program_costs(items: np.ndarray, batch_heads: int, group: int) -> np.ndarray:
    """(programs,) column tiles of each program in launch order."""
    tiles = len(items)
    order = [head_of.fn(program, batch_heads, group, tiles)[0] for program in range(batch_heads * tiles)]
    return column_tiles(items)[order] + FIXED_TILES


def makespan(costs: np.ndarray, slots: int) -> float:
    """Time until the last of `slots` is idle."""
    free = [0.0] * slots
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def efficiency(
    lengths: list[int], tokens: int, window: int | None, sink: int, config: dict[str, int],
    batch_heads: int, group: int, slots: int, by_key: bool = False,
) -> float:  # fmt: skip
    """Work / (slots x makespan), 1 when no slot is ever idle."""
    segments = block_causal(lengths, window, sink)
    items = make_tables(segments, tokens, tokens, config["BLOCK_M"], config["BLOCK_N"], by_key).items
    costs = program_costs(items, batch_heads, group)
    return costs.sum() / (slots * makespan(costs, slots))
