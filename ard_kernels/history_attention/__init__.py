"""Few-step sampling with history: the cache, the op that appends and attends, and which layer does which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from ard_kernels.block_causal_attention import block_causal_attention, block_causal_attention_packed
from ard_kernels.block_causal_attention.spec import check_qkv, check_window, rows_apart
from ard_kernels.common.arguments import check_int, check_scale, described, is_int
from ard_kernels.common.autocast import cast_to_autocast
from ard_kernels.common.backends import resolve
from ard_kernels.history_attention.cache import HistoryCache
from ard_kernels.history_attention.gradient import attend_outside_of_graphs, attend_with_gradient
from ard_kernels.history_attention.norm import HeadNorm, check_norm
from ard_kernels.history_attention.op import check_memory, history_op, norm_fields
from ard_kernels.history_attention.spec import check_layer, check_segment

__all__ = ["HeadNorm", "HistoryCache", "HistoryRouting", "history_attention"]


def history_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: HistoryCache,
    *,
    layer: int,
    window: int | None = None,
    sink: int = 0,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    scale: float | None = None,
    layout: str = "bhtd",
    backend: str | None = None,
) -> torch.Tensor:
    """Append this segment's k, v to `cache` and attend from q to every segment it may see, in one op.

    After S calls the outputs equal the S segments of `block_causal_attention` with the same window and sink.

    Args:
        q, k, v: (B, H, L, D) of one new segment, or (B, L, H, D) with layout "bthd"; dtype and device of the cache.
            Segments may differ in length. Whatever comes in one call is one segment, all of it visible to all of it.
            Not memory of the cache itself.
        cache: written in place at `layer`. A step appends once to every layer, in any order.
        layer: row of the cache, 0 .. cache.layers - 1.
        window, sink, scale, layout, backend: as in `block_causal_attention`.
        q_norm, k_norm: normalise q, k over the head dim first (qk-norm). The cache then holds the normalised k. Backend
            "cuda" does it in the launch that appends, the others by PyTorch ops before theirs.

    Returns:
        out, like q in shape, layout and dtype. Differentiable in q, k, v and the norms' parameters: in the own segment,
        that is; earlier ones are constants, whatever they were made from (self-rollout training). Such a call copies
        what it sees of the cache, and is not captured by torch.compile. For sampling use torch.no_grad().

    Without gradients torch.compile makes one graph for all steps of a shape: where the cache stands is read when it
    runs. A CUDA graph that you capture yourself replays the places it was captured at: capture all steps from
    `cache.reset()` on.

    Raises:
        ValueError: an argument outside this contract, no room left, or a cache whose layers have not all taken the
            step before; the cache then keeps its contents.
        RuntimeError: in a backward pass. Activation checkpointing around this call would append its segment twice.
        NotImplementedError: in torch.export, whose program would hold the cache's contents as constants.
    """
    op = "history_attention"
    # The flag and not torch.compiler.is_exporting(), which is True in all that torch 2.11 compiles.
    if getattr(torch.compiler, "_is_exporting_flag", False):
        raise NotImplementedError(f"{op}: torch.export would freeze the cache into the program; expected torch.compile")
    check_qkv(op, q, k, v, layout, grouped=False)
    window, sink = check_window(op, window, sink)
    scale = check_scale(op, scale, q.shape[-1])
    if not isinstance(cache, HistoryCache):
        raise ValueError(f"{op}: cache is {described(cache)}; expected an ard_kernels.HistoryCache")
    if not is_compiling():  # there the op checks when it runs
        check_memory(cache.keys, cache.values, cache.workspace, cache.positions)
    check_layer(op, layer, cache.layers)
    token_dim = layout.index("t")
    q, k, v = (x if rows_apart(x, token_dim) else x.contiguous() for x in cast_to_autocast(q, k, v))
    if layout == "bthd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    check_norm(op, "q_norm", q_norm, q)
    check_norm(op, "k_norm", k_norm, k)
    check_segment(op, k, cache.keys)
    chosen = resolve(op, backend, q.device, q.dtype, q.shape[-1])
    if torch.is_grad_enabled() and _requires_grad(q, k, v, q_norm, k_norm):
        attend = attend_outside_of_graphs if is_compiling() else attend_with_gradient
        out = attend(q, k, v, cache, layer, window, sink, scale, q_norm, k_norm, chosen)
        return out.transpose(1, 2) if layout == "bthd" else out
    memory = (cache.keys, cache.values, cache.workspace, cache.positions)
    norms = (*norm_fields(q_norm), *norm_fields(k_norm))
    out = history_op(q, k, v, *memory, layer, window, sink, scale, *norms, chosen)
    return out.transpose(1, 2) if layout == "bthd" else out


def _requires_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *norms: HeadNorm | None) -> bool:
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return any(x is not None and x.requires_grad for norm in norms if norm for x in (norm.weight, norm.bias))


class HistoryRouting:
    """Which layers read history: layers 0 .. history_layers-1 of `depth` do, the others see their own segment.

    q and k come normalised if the model has qk-norm: training needs its gradient, which no op of ours has.

    Args:
        depth: layers of the model.
        history_layers: N of the paper, 0 (plain step distillation) to depth.
        window, sink: the mask of the history layers, in segments; see `block_causal_attention`.
    """

    def __init__(self, depth: int, history_layers: int, window: int | None = None, sink: int = 0):
        depth = check_int("HistoryRouting", "depth", depth, 1)
        if not is_int(history_layers) or not 0 <= history_layers <= depth:
            got = described(history_layers)
            raise ValueError(f"HistoryRouting: history_layers is {got}; expected 0 to depth={depth}")
        self.depth, self.history_layers = depth, int(history_layers)
        self.window, self.sink = check_window("HistoryRouting", window, sink)

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        segment_length: int | Sequence[int],
        cache: HistoryCache | None = None,
        layout: str = "bhtd",
        scale: float | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The attention of `layer` as its place in the model asks.

        Without a cache q, k, v hold all segments (teacher-forced training). With one they hold a single new segment
        (sampling): history layers append it and attend to the past, the others attend within it and keep nothing.
        """
        shared: dict[str, Any] = {"layout": layout, "scale": scale, "backend": backend}
        if cache is not None and self.reads_history(layer):
            return history_attention(q, k, v, cache, layer=layer, window=self.window, sink=self.sink, **shared)
        return block_causal_attention(q, k, v, segment_length=segment_length, **self.mask(layer), **shared)

    def attention_packed(
        self,
        layer: int,
        qkv: torch.Tensor,
        *,
        segment_length: int | Sequence[int],
        cache: HistoryCache | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """`attention` of qkv (B, T, 3, H, D); returns (B, T, H, D). See `block_causal_attention_packed`."""
        shared: dict[str, Any] = {"scale": scale, "backend": backend}
        if cache is not None and self.reads_history(layer):
            q, k, v = qkv.unbind(2)
            mask: dict[str, Any] = {"window": self.window, "sink": self.sink}
            return history_attention(q, k, v, cache, layer=layer, layout="bthd", **mask, **shared)
        return block_causal_attention_packed(qkv, segment_length=segment_length, **self.mask(layer), **shared)

    def reads_history(self, layer: int) -> bool:
        """Whether `layer` attends to earlier segments. ValueError for a layer the model does not have."""
        check_layer("HistoryRouting", layer, self.depth)
        return layer < self.history_layers

    def mask(self, layer: int) -> dict[str, Any]:
        """`window` and `sink` of `layer`; block-diagonal above the history layers."""
        return {"window": self.window, "sink": self.sink} if self.reads_history(layer) else {"window": 1, "sink": 0}

    def __repr__(self) -> str:
        return f"HistoryRouting({self.depth}, {self.history_layers}, window={self.window}, sink={self.sink})"
