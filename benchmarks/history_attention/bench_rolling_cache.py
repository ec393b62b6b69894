"""A denoising call and a kept one of an endless stream, beside the attention alone: the cache may cost 2 %.

The ring is full. "attention alone" is ours without a cache over keys and values that lie ready; "sdpa" the same by
PyTorch. "shifted" keeps the window as the public video models do, what is older is moved down with clone(); it is
measured apart, since whoever follows it finds the caches full of what it moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ard_kernels import HistoryCache, SegmentMask, history_attention, segment_attention
from ard_kernels.tune.timing import interleaved
from benchmarks.measure import Group, Measurement
from benchmarks.results import compared
from benchmarks.timing import DEVICE, TINY, wall_timer

ON_GPU = DEVICE.type == "cuda"
# Wan-1.3B in chunks of 3 frames, sink 3, window 7 (LongLive's); on the CPU fewer heads and shorter chunks.
H, D, L = (1, 64, 16) if TINY else (12, 128, 4680) if ON_GPU else (4, 128, 234)
WINDOW, SINK = 7, 3
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WHOLE = SegmentMask([[True]])


def full_ring() -> HistoryCache:
    roll = {"segment_length": L, "window": WINDOW, "sink": SINK, "dtype": DTYPE, "device": DEVICE}
    cache = HistoryCache.rolling(1, 1, H, D, **roll)
    for _ in range(WINDOW + SINK):
        history_attention(*own_segment(), cache, layer=0)
    return cache


def own_segment() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, L, 3, H, D, dtype=DTYPE, device=DEVICE).transpose(1, 3).unbind(2)


def shifted(keys: torch.Tensor, values: torch.Tensor) -> Callable:
    """Sink first, own segment last; the rest one segment down, through a copy of it."""

    def run(q, k, v):
        for held, own in ((keys, k), (values, v)):
            held[:, :, SINK * L : -L] = held[:, :, (SINK + 1) * L :].clone()
            held[:, :, -L:] = own
        return F.scaled_dot_product_attention(q, keys, values)

    return run


@torch.no_grad()
def compare(commit: bool, peers: tuple[str, ...]) -> Measurement:
    cache, other, inputs = full_ring(), full_ring(), own_segment()
    q, k, v = inputs
    ready = [torch.cat([held[0], own], 2)[:, :, L:].contiguous() for held, own in ((cache.keys, k), (cache.values, v))]
    lengths = {"segment_length": L, "key_segment_length": (WINDOW + SINK) * L}
    runs = {
        "ours": lambda: history_attention(*inputs, cache, layer=0, commit=commit),
        "attention_alone": lambda: segment_attention(q, *ready, WHOLE, **lengths),
        "sdpa": lambda: F.scaled_dot_product_attention(q, *ready),
        "shifted": partial(shifted(other.keys[0].clone(), other.values[0].clone()), *inputs),
    }
    runs = {name: runs[name] for name in ("ours", *peers)}
    timings = interleaved(runs, 40, 2, timer=wall_timer(DEVICE), seconds=8.0)
    shape = f"B1 H{H} D{D} L{L} window {WINDOW} sink {SINK}, {'kept' if commit else 'not kept'}"
    facts = {"op": "rolling_cache", "shape": shape, "direction": "forward", "dtype": str(DTYPE).removeprefix("torch.")}
    return Measurement([compared(timings, "ours", peers, 1 / 1.02, **facts)], timings)


ALONE = ("attention_alone", "sdpa")
GROUPS = [
    Group(f"rolling cache, {name}", ("ours", *peers), partial(compare, commit, peers))
    for name, commit, peers in (
        ("not kept", False, ALONE),
        ("kept", True, ALONE),
        ("kept, against clone", True, ("shifted",)),
    )
]


def test_time(group, candidate, report):
    report(group, candidate)
