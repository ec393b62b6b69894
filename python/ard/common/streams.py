"""Randomness as pure functions of (seed, index): noise, and the order in which training visits samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

# One Philox key per use of randomness: streams with the same seed never overlap.
STREAMS = {"noise": 1, "order": 2, "teacher": 3, "real": 4, "posterior": 5, "prompts": 6, "scenes": 7, "cells": 8}


def random_stream(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """The generator of ``(seed, stream, index)``.

    The index sits in the high word of Philox's 256-bit counter, so the streams of two indices cannot meet
    (a Mersenne Twister seeded by a hash would collide after ~2**16 indices).
    """
    if stream not in STREAMS:
        raise ValueError(f"random_stream: stream is {stream!r}; expected one of {sorted(STREAMS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"random_stream: seed={seed}, index={index}; expected both >= 0")
    return np.random.Generator(np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, 0, index]))


def noise_at(seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "noise") -> torch.Tensor:
    """Standard normal noise, float32 (len(indices), *shape); row i depends on (seed, indices[i]) only."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices):
        noise[row] = random_stream(seed, stream, int(index)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(noise)


@functools.lru_cache(maxsize=4)
def _epoch_permutation(seed: int, epoch: int, count: int, stream: str) -> np.ndarray:
    return random_stream(seed, stream, epoch).permutation(count)


def batch_indices(seed: int, step: int, batch_size: int, count: int, stream: str = "order") -> torch.Tensor:
    """Sample indices (batch_size,) int64 of training step ``step`` over ``count`` samples.

    The stream visits all samples once per epoch, in an order drawn from (seed, epoch); a batch may span two epochs.
    """
    return shuffled(seed, range(step * batch_size, (step + 1) * batch_size), count, stream)


def shuffled(seed: int, positions: Sequence[int], count: int, stream: str) -> torch.Tensor:
    """What stands at these positions of a stream, int64 in [0, count): each number once in every ``count`` places."""
    if count < 1:
        raise ValueError(f"shuffled: count={count}; expected at least one sample")
    indices = [_epoch_permutation(seed, int(p) // count, count, stream)[int(p) % count] for p in positions]
    return torch.from_numpy(np.array(indices, dtype=np.int64))
