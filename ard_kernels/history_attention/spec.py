"""Validation of history attention; what a segment sees is in places.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.common.arguments import check_tensor, described, is_int
from ard_kernels.common.autocast import autocast_dtype
from ard_kernels.common.library import private
from ard_kernels.history_attention.places import HEADER

_backward_pass = private("_C._current_graph_task_id")  # -1 outside of one


def refuse_recomputation(op: str) -> None:
    """RuntimeError inside a backward pass: checkpointing runs the forward again, and that would append once more."""
    if _backward_pass is not None and _backward_pass() != -1:
        raise RuntimeError(
            f"{op}: called in a backward pass, where activation checkpointing runs a function again: the cache has "
            "moved on by then, and the segment would see itself as its past; expected the call outside of "
            "torch.utils.checkpoint"
        )


def check_layer(op: str, layer: int, layers: int) -> None:
    """ValueError unless 0 <= layer < layers."""
    if not is_int(layer) or not 0 <= layer < layers:
        raise ValueError(f"{op}: layer is {described(layer)}; expected 0 to {layers - 1}")


def check_segment(op: str, k_BHTD: torch.Tensor, keys: torch.Tensor) -> None:
    """ValueError unless k (B, H_kv, L, D) can go into the cache's keys (layers, B, H_kv, capacity, D)."""
    B, H_kv, L, D = k_BHTD.shape
    _, *sizes, _, head_dim = keys.shape
    if (*sizes, head_dim) != (B, H_kv, D):
        raise ValueError(
            f"{op}: k has (batch, heads, head_dim) {(B, H_kv, D)}; expected the cache's {(*sizes, head_dim)} "
            "(is the layout right?)"
        )
    if k_BHTD.device != keys.device:
        raise ValueError(f"{op}: k is on {k_BHTD.device}; expected the cache's {keys.device}")
    if L < 1:
        raise ValueError(f"{op}: k has {L} tokens; expected a segment of at least 1")


def check_dtype(op: str, dtype: torch.dtype, keys: torch.Tensor) -> None:
    """ValueError unless `dtype`, that of k after autocast, is the cache's."""
    if dtype != keys.dtype:
        autocast = autocast_dtype(keys.device)
        why = f" (autocast to {autocast} is on: make the cache in that dtype)" if autocast == dtype else ""
        raise ValueError(f"{op}: k has dtype {dtype}; expected the cache's {keys.dtype}{why}")


def check_memory(
    op: str, keys: torch.Tensor, values: torch.Tensor, workspace: torch.Tensor, positions: torch.Tensor, elements: int
) -> None:
    """ValueError unless these are the tensors that a HistoryCache makes; `resize_` or `.data` may have changed them.

    elements: the least that the workspace has.
    """
    shape, device = keys.shape, keys.device
    if len(shape) != 5 or values.shape != shape or values.dtype != keys.dtype or values.device != device:
        got = f"{described(keys)}, cache.values {described(values)}"
        raise ValueError(f"{op}: cache.keys is {got}; expected (layers, B, H_kv, capacity, D), both alike")
    for name, x in (("keys", keys), ("values", values), ("workspace", workspace), ("positions", positions)):
        if not x.is_contiguous():
            raise ValueError(f"{op}: cache.{name} has strides {x.stride()}; expected contiguous memory")
        if x.requires_grad:
            raise ValueError(f"{op}: cache.{name} requires a gradient; expected constants, written under no_grad()")
    if workspace.dtype != torch.float32 or workspace.device != device or workspace.numel() < elements:
        got = described(workspace)
        raise ValueError(f"{op}: cache.workspace is {got}; expected {elements} float32 elements on {device} or more")
    least = HEADER + shape[0] + 1  # of a cache that rolls; one that grows has an entry for each token
    counts = (least, least + shape[3])
    right = positions.dim() == 1 and positions.shape[0] in counts  # len() asks who traces, by a private name
    if not right or positions.dtype != torch.int64 or not positions.is_cpu:
        got = described(positions)
        raise ValueError(f"{op}: cache.positions is {got}; expected {counts[0]} or {counts[1]} int64 on the CPU")


def check_sink_query(op: str, q_sink: torch.Tensor | None, q: torch.Tensor, sink: int) -> None:
    """ValueError unless q_sink is None, or like q with a sink."""
    if q_sink is None:
        return
    check_tensor(op, "q_sink", q_sink)
    if q_sink.shape != q.shape or q_sink.dtype != q.dtype or q_sink.device != q.device:
        got, expected = f"{described(q_sink)} on {q_sink.device}", f"{described(q)} on {q.device}"
        raise ValueError(f"{op}: q_sink is {got}; expected it like q, {expected}")
    if sink == 0:
        raise ValueError(f"{op}: q_sink is given with sink 0; expected None, or a sink whose keys it is for")


def check_apart(op: str, inputs: Sequence[torch.Tensor], keys: torch.Tensor, values: torch.Tensor) -> None:
    """ValueError if an input lies in the cache's memory, which is written before everything of it is read."""
    if keys.is_meta:
        return
    nbytes = keys.nbytes  # of the values too
    for start in (keys.data_ptr(), values.data_ptr()):
        if any([start <= x.data_ptr() < start + nbytes for x in inputs]):
            raise ValueError(f"{op}: an input is memory of the cache; expected q, k, v (and q_sink) of their own")
