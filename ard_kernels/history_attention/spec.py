"""History attention, said once: which cached tokens a new segment sees, where a cache stands, and validation.

The cache holds segments 0 .. s-1 of a layer; the new segment s sees, as in block-causal attention, the tokens
[0, sink_stop) of the first `sink` segments and [window_start, stop) of its window, its own included.

`positions` is int64 on the host: the number of segments that each layer holds, then the token at which segment i
starts, for i = 0 .. capacity. All layers take the same steps, so they share the second part; within a step some layers
hold one segment more than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ard_kernels.block_causal_attention.mask import first_window_segment
from ard_kernels.common.arguments import described, is_int
from ard_kernels.common.autocast import autocast_dtype
from ard_kernels.common.library import private

_backward_pass = private("_C._current_graph_task_id")  # -1 outside of one


def visible_tokens(offsets: Sequence[int], window: int | None, sink: int) -> tuple[int, int]:
    """(sink_stop, window_start) for the last segment of `offsets` (S + 1 entries); no sink apart from the window: 0."""
    first = first_window_segment(len(offsets) - 2, window)
    return (0, 0) if sink >= first else (offsets[sink], offsets[first])


def new_positions(layers: int, capacity: int) -> torch.Tensor:
    """Of an empty cache."""
    with torch.inference_mode(False):  # steps outside of inference mode may move them on, too
        return torch.zeros(layers + capacity + 1, dtype=torch.int64, device="cpu")


def offsets_of(positions: torch.Tensor, layers: int, layer: int) -> list[int]:
    """First token of each segment that `layer` holds, then the number of tokens."""
    return positions[layers : layers + int(positions[layer]) + 1].tolist()


def next_offsets(op: str, positions: np.ndarray, layers: int, capacity: int, layer: int, length: int) -> list[int]:
    """`offsets_of` the layer with a new segment of `length` tokens; `advance` makes it so.

    positions: as an array over the tensor's memory, which is read three times faster.

    Raises:
        ValueError: no room; an earlier step that left layers behind; another length than the step has in other layers.
    """
    segments = positions[:layers].tolist()
    own, most = segments[layer], max(segments)
    starts = positions[layers : layers + most + 1].tolist()
    if min(segments) < 0 or most > capacity or not _ascend(starts, capacity):
        raise ValueError(
            f"{op}: cache.positions is damaged; expected what the op has written (reset() empties the cache)"
        )
    behind = [i for i, count in enumerate(segments) if count < own]
    if behind:
        raise ValueError(
            f"{op}: layer {layer} of the cache holds {own} segments, but layer {behind[0]} holds "
            f"{segments[behind[0]]}: an earlier step did not reach it; expected every step to append to every layer "
            "(reset() empties the cache)"
        )
    start = starts[own]
    if own < most and start + length != starts[own + 1]:
        raise ValueError(
            f"{op}: k has {length} tokens in layer {layer}; expected {starts[own + 1] - start}, as in the layers that "
            "have taken this step"
        )
    if start + length > capacity:
        raise ValueError(
            f"{op}: layer {layer} of the cache holds {start} of {capacity} tokens; expected room for {length} more "
            "(reset() empties it)"
        )
    return [*starts[: own + 1], start + length]


def _ascend(starts: list[int], capacity: int) -> bool:
    return starts[0] == 0 and starts[-1] <= capacity and all([a < b for a, b in pairwise(starts)])


def refuse_recomputation(op: str) -> None:
    """RuntimeError inside a backward pass: checkpointing runs the forward again, and that would append once more."""
    if _backward_pass is not None and _backward_pass() != -1:
        raise RuntimeError(
            f"{op}: called in a backward pass, where activation checkpointing runs a function again: the segment would "
            "be appended twice, and see itself as its past; expected the call outside of torch.utils.checkpoint"
        )


def advance(positions: np.ndarray, layers: int, layer: int, offsets: Sequence[int]) -> None:
    """Note that `layer` holds the segments of `offsets`, the last of which is new."""
    own = len(offsets) - 1
    positions[layer], positions[layers + own] = own, offsets[-1]


def check_layer(op: str, layer: int, layers: int) -> None:
    """ValueError unless 0 <= layer < layers."""
    if not is_int(layer) or not 0 <= layer < layers:
        raise ValueError(f"{op}: layer is {described(layer)}; expected 0 to {layers - 1}")


def check_segment(op: str, k_BHTD: torch.Tensor, keys: torch.Tensor) -> None:
    """ValueError unless k (B, H, L, D) can go into the cache's keys (layers, B, H, capacity, D)."""
    B, H, L, D = k_BHTD.shape
    _, *sizes, _, head_dim = keys.shape
    if (*sizes, head_dim) != (B, H, D):
        raise ValueError(
            f"{op}: k has (batch, heads, head_dim) {(B, H, D)}; expected the cache's {(*sizes, head_dim)} "
            "(is the layout right?)"
        )
    if k_BHTD.dtype != keys.dtype:
        autocast = autocast_dtype(k_BHTD.device)
        why = f" (autocast to {autocast} is on: make the cache in that dtype)" if autocast == k_BHTD.dtype else ""
        raise ValueError(f"{op}: k has dtype {k_BHTD.dtype}; expected the cache's {keys.dtype}{why}")
    if k_BHTD.device != keys.device:
        raise ValueError(f"{op}: k is on {k_BHTD.device}; expected the cache's {keys.device}")
    if L < 1:
        raise ValueError(f"{op}: k has {L} tokens; expected a segment of at least 1")


def check_memory(
    op: str, keys: torch.Tensor, values: torch.Tensor, workspace: torch.Tensor, positions: torch.Tensor, elements: int
) -> None:
    """ValueError unless these are the tensors that a HistoryCache makes; `resize_` or `.data` may have changed them.

    elements: the least that the workspace has.
    """
    shape, device = keys.shape, keys.device
    if len(shape) != 5 or values.shape != shape or values.dtype != keys.dtype or values.device != device:
        got = f"{described(keys)}, cache.values {described(values)}"
        raise ValueError(f"{op}: cache.keys is {got}; expected (layers, B, H, capacity, D), both alike")
    for name, x in (("keys", keys), ("values", values), ("workspace", workspace), ("positions", positions)):
        if not x.is_contiguous():
            raise ValueError(f"{op}: cache.{name} has strides {x.stride()}; expected contiguous memory")
    if workspace.dtype != torch.float32 or workspace.device != device or workspace.numel() < elements:
        got = described(workspace)
        raise ValueError(f"{op}: cache.workspace is {got}; expected {elements} float32 elements on {device} or more")
    count = shape[0] + shape[3] + 1
    if positions.shape != (count,) or positions.dtype != torch.int64 or not positions.is_cpu:
        got = described(positions)
        raise ValueError(f"{op}: cache.positions is {got}; expected int64 of shape {(count,)} on the CPU")
