"""The preallocated K/V history of the layers that attend to earlier segments."""

from __future__ import annotations

import torch

from ard_kernels.history.splits import workspace_elements


class HistoryCache:
    """Keys and values of earlier segments for `layers` layers, allocated once.

    Args:
        layers: history layers N; layer i of `history_attention` is row i here.
        batch, heads, head_dim: B, H, D of the keys.
        capacity: tokens a layer can hold, S * L for S steps.
        dtype, device: of the keys and values.

    Attributes:
        keys, values: (layers, B, H, capacity, D); only the first `offsets[layer][-1]` tokens of a layer are valid.
        workspace: fp32, for the partial results of a batch too small to fill a GPU (a few MB; empty on the CPU).
        offsets: per layer, the token at which each held segment starts, then the number of tokens held.
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
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"HistoryCache: {name} is {size!r}; expected an int >= 0")
        if not dtype.is_floating_point:
            raise ValueError(f"HistoryCache: dtype is {dtype}; expected a floating-point dtype")
        self.layers, self.batch, self.heads, self.head_dim, self.capacity = layers, batch, heads, head_dim, capacity
        self.keys = torch.empty(layers, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.dtype, self.device = dtype, self.keys.device
        self.workspace = torch.empty(workspace_elements(head_dim, self.device), device=self.device)
        self.offsets = [[0] for _ in range(layers)]

    def reset(self) -> None:
        """Forget every segment; the memory stays."""
        self.offsets = [[0] for _ in range(self.layers)]

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
