"""How the GPU kernels of the adaLN family cut the tokens: into chunks that lie within one segment. Index algebra only.

chunks  (n, 3)  segment, first token, stop token; the segments' rows are read once per chunk
spans   (S, 2)  first and last + 1 chunk of each segment, whose partial row gradients are added in that order
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ard_kernels.common.gpu_support import upload
from ard_kernels.common.segments import segment_offsets


class Chunks(NamedTuple):
    """The tables of the module's docstring, on a device."""

    chunks: torch.Tensor
    spans: torch.Tensor


def make_chunks(lengths: Sequence[int], tokens: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunks, spans) with chunks of at most `most` tokens, of near equal size within a segment."""
    chunks: list[tuple[int, ...]] = []
    spans: list[tuple[int, int]] = []
    for segment, (start, stop) in enumerate(pairwise(segment_offsets(lengths, tokens))):
        count = -(-(stop - start) // most)
        cuts = [start + (stop - start) * i // count for i in range(count + 1)]
        spans.append((len(chunks), len(chunks) + count))
        chunks += [(segment, *pair) for pair in pairwise(cuts)]
    return np.array(chunks, np.int32).reshape(-1, 3), np.array(spans, np.int32).reshape(-1, 2)


def chunk_tokens(tokens: int, batch: int, most: int, multiprocessors: int) -> int:
    """`most`, halved while there would be less than 2 programs per multiprocessor; at least 4."""
    while most > 4 and batch * tokens < 2 * multiprocessors * most:
        most //= 2
    return most


@lru_cache(maxsize=1024)
def chunks(lengths: tuple[int, ...], tokens: int, most: int, device: torch.device) -> Chunks:
    """The tables on `device`; made once."""
    return Chunks(*(upload(table, device) for table in make_chunks(lengths, tokens, most)))
