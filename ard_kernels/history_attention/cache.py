"""The preallocated K/V history of the layers that attend to earlier segments."""

from __future__ import annotations

import torch

from ard_kernels.block_causal_attention.spec import check_dtype_and_head_dim
from ard_kernels.common.arguments import check_int, described
from ard_kernels.history_attention.spec import new_positions, offsets_of
from ard_kernels.history_attention.splits import workspace_elements


class HistoryCache:
    """Keys and values of earlier segments for `layers` layers, allocated once.

    Args:
        layers: history layers N; layer i of `history_attention` is row i here.
        batch, heads, head_dim: B, H, D of the keys.
        capacity: tokens a layer can hold, S * L for S steps.
        dtype, device: of the keys and values.

    Attributes are read-only; what keys and values hold may be changed, not what they are.

    Attributes:
        keys, values: (layers, B, H, capacity, D); only the first `offsets[layer][-1]` tokens of a layer are valid.
        workspace: fp32, for the partial results of a batch too small to fill a GPU (a few MB; empty on the CPU).
        positions: int64 on the CPU, which segments each layer holds and where they start; `offsets` reads it. A tensor,
            so that a compiled step finds its place when it runs.

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
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "capacity": capacity}
        for name, size in sizes.items():
            sizes[name] = check_int("HistoryCache", name, size, 0)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"HistoryCache: dtype is {described(dtype)}; expected a torch.dtype")
        check_dtype_and_head_dim("HistoryCache", "the cache", dtype, head_dim)
        self.layers, self.batch, self.heads, self.head_dim, self.capacity = sizes.values()
        self.keys = torch.empty(layers, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.dtype, self.device = dtype, self.keys.device
        elements = workspace_elements(head_dim, self.device)
        self.workspace = torch.empty(elements, dtype=torch.float32, device=self.device)
        self.positions = new_positions(self.layers, self.capacity)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise AttributeError(f"HistoryCache.{name} is read-only; expected a new HistoryCache for other tensors")
        super().__setattr__(name, value)

    def reset(self) -> None:
        """Forget every segment; the memory stays."""
        self.positions.zero_()

    @property
    def offsets(self) -> list[list[int]]:
        """Per layer, the token at which each held segment starts, then the number of tokens held."""
        return [offsets_of(self.positions, self.layers, layer) for layer in range(self.layers)]

    @property
    def length(self) -> int:
        """Tokens held by the layer that is furthest along (all layers agree between two steps)."""
        return max((offsets[-1] for offsets in self.offsets), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def __repr__(self) -> str:
        shape = f"layers={self.layers}, batch={self.batch}, heads={self.heads}, head_dim={self.head_dim}"
        return f"HistoryCache({shape}, length={self.length}/{self.capacity}, {self.dtype}, {self.device})"
