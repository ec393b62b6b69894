"""Split-KV for few, long rows (batch 1): how many programs share the keys of a query tile. Index algebra only."""

from __future__ import annotations

import torch

from ard_kernels.common import extension
from ard_kernels.common.gpu_support import multiprocessors
from ard_kernels.common.triton_support import INTERPRETING

# A split has at least this many key tiles, or the second launch that adds the splits up costs more than it saves.
LEAST_TILES = 4
MAX_BLOCK_M = 128


def split_count(row_tiles: int, column_tiles: int, device_multiprocessors: int) -> int:
    """As many splits as leave every multiprocessor at most one program, each with LEAST_TILES column tiles or more."""
    return max(1, min(device_multiprocessors // max(1, row_tiles), column_tiles // LEAST_TILES))


def share_tiles(row_tiles: int, column_tiles: int, device_multiprocessors: int) -> tuple[int, int]:
    """(splits, column tiles of each); the last may have fewer, none is empty."""
    tiles_per_split = -(-column_tiles // split_count(row_tiles, column_tiles, device_multiprocessors))
    return -(-column_tiles // tiles_per_split), tiles_per_split


def workspace_elements(head_dim: int, device: torch.device) -> int:
    """fp32 elements that hold the partial results of any split launch on `device`: per row an output, maximum, sum."""
    if device.type != "cuda" and not INTERPRETING and extension.emulated is None:
        return 0
    return multiprocessors(device) * MAX_BLOCK_M * (head_dim + 2)
