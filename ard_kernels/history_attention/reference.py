"""The slow oracle of history attention: keep every segment in a list and attend densely in fp64. Tests only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.block_causal_attention.reference import block_causal_attention


def history_attention(
    segments: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    window: int | None = None,
    sink: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Output (B, H, L_s, D) of the last of `segments`, a list of (q, k, v) each (B, H, L_i, D)."""
    q, k, v = (torch.cat(parts, 2) for parts in zip(*segments, strict=True))
    lengths = [segment[0].shape[2] for segment in segments]
    return block_causal_attention(q, k, v, lengths, window, sink, scale)[0][:, :, -lengths[-1] :]
