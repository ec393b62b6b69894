"""Few-step sampling with history: the cache, the op that appends and attends, and which layer does which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from ard_kernels.block_causal_attention import block_causal_attention, block_causal_attention_packed
from ard_kernels.block_causal_attention.cpu import measured_slower
from ard_kernels.block_causal_attention.spec import check_packed, check_qkv, check_window, rows_apart
from ard_kernels.common.arguments import check_int, check_scale, described, is_int
from ard_kernels.common.autocast import cast_to_autocast, dtype_in_autocast
from ard_kernels.common.backends import choose
from ard_kernels.common.kinds import once_per_kind
from ard_kernels.common.library import transformed
from ard_kernels.common.segments import check_segment_length
from ard_kernels.common.self_check import register_trials
from ard_kernels.history_attention.cache import HistoryCache
from ard_kernels.history_attention.copied import attend_outside_of_graphs, attend_to_copy
from ard_kernels.history_attention.op import check_memory, history_op
from ard_kernels.history_attention.spec import check_dtype, check_layer, check_segment, check_sink_query
from ard_kernels.history_attention.trials import UNIT

register_trials(UNIT, UNIT.op)

__all__ = ["HistoryCache", "HistoryRouting", "history_attention"]


def history_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: HistoryCache,
    *,
    layer: int,
    commit: bool = True,
    q_sink: torch.Tensor | None = None,
    segment_length: int | Sequence[int] | None = None,
    window: int | None = None,
    sink: int | None = None,
    scale: float | None = None,
    layout: str = "bhtd",
    backend: str | None = None,
) -> torch.Tensor:
    """Attend from q to this segment and to every earlier one it may see, and append its k, v to `cache`, in one op.

    After S calls the outputs equal the S segments of `block_causal_attention` with the same window and sink.

    Args:
        q: (B, H, L, D) of one new segment, or (B, L, H, D) with layout "bthd"; dtype and device of the cache.
            Neither it nor what follows may be memory of the cache.
        k, v: like q, with the cache's H_kv heads, of which H is a multiple (grouped queries).
        cache: written in place at `layer`. A step takes one call with `commit` per layer. If every step goes through
            the layers in the same order, one that broke off is noticed at the next step's first call.
        layer: row of the cache, 0 .. cache.layers - 1.
        commit: False attends to the past and to its own segment and keeps nothing: the denoising calls of a segment,
            before the one on its clean tokens that stays.
        q_sink: like q, the query for the keys of the sink's earlier segments; default q. Scores of rotary embeddings
            depend on distances alone, so a query that is turned to another position sees the sink as near as it
            likes, and no cached key is turned again. Needs a sink.
        segment_length: tokens per segment L, or the lengths, of several new segments in one call (a prompt's frames);
            None: whatever comes is one segment, all of it visible to all of it.
        window, sink: as in `block_causal_attention`; of a rolling cache those it was made with, which are the default.
        scale, layout, backend: as in `block_causal_attention`.

    Returns:
        out, like q in shape, layout and dtype. Differentiable in q, q_sink, k, v, in the own segment, that is; earlier
        ones are constants, whatever they were made from (self-rollout training). A call with a gradient or of several
        segments copies what it sees of the cache, and is not captured by torch.compile. For sampling use
        torch.no_grad().

    Otherwise torch.compile makes one graph for all steps of a shape: where the cache stands is read when it runs. A
    CUDA graph that you capture yourself replays the places it was captured at: capture all steps from `cache.reset()`
    on; of a rolling cache that is full, the steps of `window` segments, and repeat them.

    Raises:
        ValueError: an argument outside this contract, no room left, or a cache whose layers have not all taken the
            step before; the cache then keeps its contents.
        RuntimeError: in a backward pass. Activation checkpointing around this call would append its segment twice.
        NotImplementedError: in torch.export, whose program would hold the cache's contents as constants; under
            torch.func and with forward-mode tangents; several segments or a gradient with fake tensors.
    """
    op = "history_attention"
    # The flag and not torch.compiler.is_exporting(), which is True in all that torch 2.11 compiles.
    if getattr(torch.compiler, "_is_exporting_flag", False):
        raise NotImplementedError(f"{op}: torch.export would freeze the cache into the program; expected torch.compile")
    if not is_compiling() and transformed():
        raise NotImplementedError(f"ard_kernels: {op} does not run under torch.func; expected torch.autograd")
    if not isinstance(cache, HistoryCache):
        raise ValueError(f"{op}: cache is {described(cache)}; expected an ard_kernels.HistoryCache")
    memory = cache.keys, cache.values, cache.workspace, cache.positions
    window = cache.window if window is None else window
    sink = (cache.sink or 0) if sink is None else sink
    settings = layer, commit, segment_length, window, sink, scale, layout, backend
    plan = once_per_kind(_plan, (q, k, v, q_sink, *memory), *settings)
    q, k, v, *sunk = cast_to_autocast(*((q, k, v) if q_sink is None else (q, k, v, q_sink)))
    if not plan.apart:
        q, k, v, *sunk = (x if rows_apart(x, layout.index("t")) else x.contiguous() for x in (q, k, v, *sunk))
    if layout == "bthd":
        q, k, v, *sunk = [x.transpose(1, 2) for x in (q, k, v, *sunk)]
    q_sink = sunk[0] if sunk else None
    if plan.copied:
        attend = attend_outside_of_graphs if is_compiling() else attend_to_copy
        how = layer, plan.lengths, plan.window, plan.sink, plan.scale, commit, plan.backend
        out = attend(q, k, v, q_sink, cache, *how)
    else:
        mask = plan.window, plan.sink
        out = history_op(q, k, v, q_sink, *memory, layer, *mask, plan.scale, commit, plan.backend)
    return out.transpose(1, 2) if layout == "bthd" else out


class _Plan(NamedTuple):
    """What is settled for all calls of a kind."""

    window: int | None
    sink: int
    lengths: list[int]  # of the new segments
    scale: float
    backend: str
    apart: bool  # q, k, v, q_sink can be read in place
    copied: bool  # what is seen of the cache is


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_sink: torch.Tensor | None, keys: torch.Tensor,
    values: torch.Tensor, workspace: torch.Tensor, positions: torch.Tensor, layer: int, commit: bool,
    segment_length: int | Sequence[int] | None, window: int | None, sink: int, scale: float | None, layout: str,
    backend: str | None, request: str | None,
) -> _Plan:  # fmt: skip
    op = "history_attention"
    check_qkv(op, q, k, v, layout)
    scale = check_scale(op, scale, q.shape[-1])
    if not isinstance(commit, bool):
        raise ValueError(f"{op}: commit is {described(commit)}; expected True or False")
    window, sink = check_window(op, window, sink)
    if not is_compiling():  # there the op checks when it runs
        check_memory(keys, values, workspace, positions)
    check_layer(op, layer, keys.shape[0])
    token_dim, tokens = layout.index("t"), q.shape[layout.index("t")]
    lengths = [tokens]
    if segment_length is not None and tokens:
        lengths = check_segment_length(op, segment_length, "q", tokens, (token_dim, q.shape, layout))
        lengths = lengths * (tokens // lengths[0]) if len(lengths) == 1 else lengths
    check_segment(op, k if layout == "bhtd" else k.transpose(1, 2), keys)
    check_sink_query(op, q_sink, q, sink)
    check_dtype(op, dtype_in_autocast(k), keys)
    inputs = [q, k, v] if q_sink is None else [q, k, v, q_sink]
    copied = len(lengths) > 1 or (torch.is_grad_enabled() and any([x.requires_grad for x in inputs]))
    kernels = "segment_attention" if copied or q_sink is not None else op  # that run: theirs is the self-check
    slow = measured_slower(inputs, keys.dtype, lengths)
    chosen = choose(kernels, backend, request, q.device, keys.dtype, q.shape[-1], slow)
    apart = all([rows_apart(x, token_dim) for x in inputs])
    return _Plan(window, sink, lengths, scale, chosen, apart, copied)


class HistoryRouting:
    """Which layers read history: layers 0 .. history_layers-1 of `depth` do, the others see their own segment.

    q and k come normalised and turned by their positions, if the model does so.

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
        commit: bool = True,
        layout: str = "bhtd",
        scale: float | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """The attention of `layer` as its place in the model asks.

        Without a cache q, k, v hold all segments (teacher-forced training). With one they hold one new segment, or
        some (sampling): history layers append (with `commit`) and attend to the past, the others keep nothing.

        Raises:
            ValueError: as the ops; a rolling cache of another window or sink.
        """
        if cache is None or not self.reads_history(layer):
            return block_causal_attention(
                q, k, v, segment_length=segment_length, **self.mask(layer), scale=scale, layout=layout, backend=backend
            )
        return self._attend_to_past(
            q, k, v, cache, layer=layer, commit=commit, segment_length=segment_length, scale=scale, layout=layout,
            backend=backend,
        )  # fmt: skip

    def attention_packed(
        self,
        layer: int,
        qkv: torch.Tensor,
        *,
        segment_length: int | Sequence[int],
        cache: HistoryCache | None = None,
        commit: bool = True,
        scale: float | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """`attention` of qkv (B, T, 3, H, D); returns (B, T, H, D). See `block_causal_attention_packed`."""
        if cache is None or not self.reads_history(layer):
            return block_causal_attention_packed(
                qkv, segment_length=segment_length, **self.mask(layer), scale=scale, backend=backend
            )
        check_packed("HistoryRouting", qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return self._attend_to_past(
            q, k, v, cache, layer=layer, commit=commit, segment_length=segment_length, scale=scale, backend=backend
        ).transpose(1, 2)

    def _attend_to_past(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: HistoryCache, **settings: Any
    ) -> torch.Tensor:
        """A rolling cache has a mask of its own; a window of None would mean that to `history_attention`."""
        own = self.window, self.sink
        if cache.window is not None and own != (cache.window, cache.sink):
            raise ValueError(
                f"HistoryRouting: window and sink are {own}; expected the rolling cache's {(cache.window, cache.sink)}"
            )
        return history_attention(q, k, v, cache, window=self.window, sink=self.sink, **settings)

    def reads_history(self, layer: int) -> bool:
        """Whether `layer` attends to earlier segments. ValueError for a layer the model does not have."""
        check_layer("HistoryRouting", layer, self.depth)
        return layer < self.history_layers

    def mask(self, layer: int) -> dict[str, Any]:
        """`window` and `sink` of `layer`; block-diagonal above the history layers."""
        return {"window": self.window, "sink": self.sink} if self.reads_history(layer) else {"window": 1, "sink": 0}

    def __repr__(self) -> str:
        return f"HistoryRouting({self.depth}, {self.history_layers}, window={self.window}, sink={self.sink})"
