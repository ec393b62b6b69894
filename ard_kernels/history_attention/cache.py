"""The preallocated K/V history of the layers that attend to earlier segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ard_kernels.block_causal_attention.spec import check_dtype_and_head_dim, check_window
from ard_kernels.common.arguments import check_int, check_tensor, described, is_int
from ard_kernels.history_attention import places
from ard_kernels.history_attention.splits import workspace_elements


class HistoryCache:
    """Keys and values of earlier segments for `layers` layers, allocated once; segment behind segment until it is full.

    `HistoryCache.rolling` makes one that is never full.

    Args:
        layers: history layers N; layer i of `history_attention` is row i here.
        batch, heads, head_dim: B, H_kv, D of the keys.
        capacity: tokens a layer can hold, S * L for S steps.
        dtype, device: of the keys and values.

    Attributes are read-only; what keys and values hold may be changed, not what they are.

    Attributes:
        keys, values: (layers, B, H_kv, capacity, D); only what segments have been written to is valid.
        workspace: fp32, for the partial results of a batch too small to fill a GPU (a few MB; empty on the CPU).
        positions: int64 on the CPU, which segments each layer holds and where they are; see `places.py`. A tensor, so
            that a compiled step finds its place when it runs.
        segment_length, window, sink: of a rolling cache; None in one that grows.

    Raises:
        ValueError: a size, head dim or dtype that `history_attention` does not take.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self._allocate(layers, batch, heads, head_dim, capacity, dtype, device, None)

    @classmethod
    def rolling(
        cls,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        segment_length: int,
        window: int,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> HistoryCache:
        """A cache of constant memory for streams without end.

        It holds the first `sink` segments and the last `window - 1`, and has one slot to write the next one to: that of
        the oldest unsunk segment, which has just left the window. Nothing is ever moved. Once it is full the shapes and
        places of a step repeat every `window` segments.

        Args:
            segment_length: tokens of a segment L; the very first one may be shorter.
            window: *segments* that a query sees, its own included and the sink not, >= 1.
            sink: the first `sink` segments are kept for ever. `history_attention` takes both from the cache.
            layers, batch, heads, head_dim, dtype, device: as in `HistoryCache`.

        Raises:
            ValueError: as `HistoryCache`; a window of None or 0.
        """
        op = "HistoryCache.rolling"
        segment_length = check_int(op, "segment_length", segment_length, 1, "tokens")
        window, sink = check_int(op, "window", window, 1, "segments"), check_window(op, 1, sink)[1]
        cache = cls.__new__(cls)
        roll = segment_length, window, sink
        cache._allocate(layers, batch, heads, head_dim, (sink + window) * segment_length, dtype, device, roll)
        return cache

    def _allocate(
        self, layers: int, batch: int, heads: int, head_dim: int, capacity: int, dtype: torch.dtype,
        device: str | torch.device, roll: tuple[int, int, int] | None,
    ) -> None:  # fmt: skip
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "capacity": capacity}
        for name, size in sizes.items():
            sizes[name] = check_int("HistoryCache", name, size, 0)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"HistoryCache: dtype is {described(dtype)}; expected a torch.dtype")
        check_dtype_and_head_dim("HistoryCache", "the cache", dtype, head_dim)
        self.layers, self.batch, self.heads, self.head_dim, self.capacity = sizes.values()
        self.segment_length: int | None = roll[0] if roll else None
        self.window: int | None = roll[1] if roll else None
        self.sink: int | None = roll[2] if roll else None
        self.keys = torch.empty(layers, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.dtype, self.device = dtype, self.keys.device
        elements = workspace_elements(head_dim, self.device)
        self.workspace = torch.empty(elements, dtype=torch.float32, device=self.device)
        self.positions = places.new_positions(self.layers, self.capacity, roll)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise AttributeError(f"HistoryCache.{name} is read-only; expected a new HistoryCache for other tensors")
        super().__setattr__(name, value)

    def reset(self) -> None:
        """Forget every segment; the memory stays."""
        self.positions[places.WRITTEN :] = 0

    def rewind(self, segments: int = 1) -> None:
        """Forget the last `segments` segments, also those that not all layers have taken.

        A rolling cache overwrites its oldest segment, so once it is full it goes back by one, right after the call that
        kept the segment.

        Raises:
            ValueError: fewer segments are held, or one that would be seen again has been overwritten; the cache then
                stays as it was.
        """
        places.rewind(self.positions.numpy(), self.layers, check_int("HistoryCache.rewind", "segments", segments, 1))

    def select(self, index_B: torch.Tensor | Sequence[int]) -> None:
        """Sample b becomes what sample `index_B[b]` was: best of n, another order of the batch.

        Raises:
            ValueError: not `batch` integers from 0 to batch - 1.
        """
        op = "HistoryCache.select"
        given: Any = index_B
        if isinstance(index_B, Sequence) and all(map(is_int, index_B)):
            given = torch.tensor(index_B, dtype=torch.int64, device="cpu")
        check_tensor(op, "index_B", given)
        index: torch.Tensor = given
        if index.shape != (self.batch,) or index.dtype not in (torch.int64, torch.int32) or index.is_meta:
            raise ValueError(f"{op}: index_B is {described(index)}; expected {self.batch} integers, one per sample")
        if self.batch and not 0 <= int(index.min()) <= int(index.max()) < self.batch:
            raise ValueError(f"{op}: index_B is {index.tolist()}; expected samples from 0 to {self.batch - 1}")
        index, held = index.to(self.device, torch.int64), self._held
        for layers in (self.keys, self.values):
            for layer in layers:  # a layer at a time: what it takes beside the cache is one layer's
                layer[:, :, :held] = layer[index, :, :held]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of what is held: "keys" and "values" (layers, B, H_kv, tokens, D), and "positions"."""
        kept = {name: getattr(self, name)[:, :, :, : self._held].clone() for name in ("keys", "values")}
        return {**kept, "positions": self.positions.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Hold what another cache of the same sizes held; values are converted to this one's dtype and device.

        Raises:
            ValueError: a state of other sizes, window or sink, or a damaged one; the cache then stays as it was.
        """
        op = "HistoryCache.load_state_dict"
        if not isinstance(state, dict) or set(state) != {"keys", "values", "positions"}:
            got = described(sorted(state) if isinstance(state, dict) else state)
            raise ValueError(f"{op}: state is {got}; expected what state_dict() gives: keys, values, positions")
        for name, x in state.items():
            check_tensor(op, name, x)
            if x.is_meta or not (name == "positions" or x.is_floating_point()):
                raise ValueError(
                    f"{op}: {name} is {described(x)} on {x.device}; expected numbers as state_dict() gives"
                )
        positions = state["positions"].to("cpu", copy=True)
        roll = self.positions[: places.WRITTEN]
        if positions.shape != self.positions.shape or positions.dtype != torch.int64 or positions[:3].ne(roll).any():
            raise ValueError(f"{op}: positions are of another cache; expected those of one like {self!r}")
        counts = positions.numpy()
        places.check_undamaged(op, places.read(counts, self.layers), counts.size, self.layers, self.capacity)
        held = places.held(counts, self.layers)[1]
        expected = (self.layers, self.batch, self.heads, held, self.head_dim)
        for name in ("keys", "values"):
            if state[name].shape != expected:
                raise ValueError(f"{op}: {name} has shape {tuple(state[name].shape)}; expected {expected}")
        with torch.no_grad():  # what a cache holds is a constant
            self.keys[:, :, :, :held] = state["keys"]
            self.values[:, :, :, :held] = state["values"]
        self.positions.copy_(positions)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> HistoryCache:
        """A cache on `device`, of `dtype`, that holds the same; this one where it is so already."""
        place = self.device if device is None else torch.empty(0, device=device).device
        dtype = self.dtype if dtype is None else dtype
        if (place, dtype) == (self.device, self.dtype):
            return self
        moved = HistoryCache.__new__(HistoryCache)
        roll = None if self.window is None else tuple(self.positions[: places.WRITTEN].tolist())
        sizes = self.layers, self.batch, self.heads, self.head_dim, self.capacity
        moved._allocate(*sizes, dtype, place, roll)
        moved.load_state_dict(self.state_dict())
        return moved

    @property
    def _held(self) -> int:
        """Tokens of the memory, from its start, that may be valid."""
        return places.held(self.positions.numpy(), self.layers)[1]

    @property
    def segments(self) -> list[int]:
        """Per layer, how many segments it has taken since the last reset: the index of its next one."""
        return self.positions[places.HEADER : places.HEADER + self.layers].tolist()

    @property
    def length(self) -> int:
        """Tokens held by the layer that is furthest along (all layers agree between two steps)."""
        start, stop = places.held(self.positions.numpy(), self.layers)
        return stop - start

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def __repr__(self) -> str:
        shape = f"layers={self.layers}, batch={self.batch}, heads={self.heads}, head_dim={self.head_dim}"
        roll = f", window={self.window}, sink={self.sink}" if self.window is not None else ""
        return f"HistoryCache({shape}{roll}, length={self.length}/{self.capacity}, {self.dtype}, {self.device})"
