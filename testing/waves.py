"""How long a launch of the attention kernels lasts on a GPU, by its tile schedule alone: thread blocks in launch order,
each taken by the next free slot (multiprocessors x resident blocks), lasting as long as it visits column tiles.

Thread blocks of one launch start in order of their number on every NVIDIA GPU seen so far, though no one promises it.
"""

from __future__ import annotations

import heapq
from itertools import islice, product

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


def shared_makespan(costs: np.ndarray, multiprocessors: int, resident: int) -> float:
    """Time until the last multiprocessor is idle, when up to `resident` blocks on one share its rate evenly.

    A block that is alone has all of it, so no schedule of whole blocks in this order ends sooner for what a
    multiprocessor's units can do.
    """
    waiting = iter(costs.tolist())
    left: list[list[float]] = [[] for _ in range(multiprocessors)]  # of each block on each multiprocessor
    for _, own in product(range(resident), left):
        own += islice(waiting, 1)
    since = [0.0] * multiprocessors
    events = [(min(own) * len(own), number) for number, own in enumerate(left) if own]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, number = heapq.heappop(events)
        own = left[number]
        done = (now - since[number]) / len(own)
        own.remove(min(own))
        own[:] = [max(0.0, cost - done) for cost in own] + list(islice(waiting, 1))
        since[number] = now
        if own:
            heapq.heappush(events, (now + min(own) * len(own), number))
    return now


def efficiency(
    lengths: list[int], tokens: int, window: int | None, sink: int, config: dict[str, int],
    batch_heads: int, group: int, slots: int, by_key: bool = False,
) -> float:  # fmt: skip
    """Work / (slots x makespan), 1 when no slot is ever idle."""
    segments = block_causal(lengths, window, sink)
    items = make_tables(segments, tokens, tokens, config["BLOCK_M"], config["BLOCK_N"], by_key).items
    costs = program_costs(items, batch_heads, group)
    return costs.sum() / (slots * makespan(costs, slots))
