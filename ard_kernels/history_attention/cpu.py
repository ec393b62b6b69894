"""History attention with the append of csrc/history_attention/cpu.cpp; the attention is PyTorch's fused CPU kernel."""

from __future__ import annotations

import torch

from ard_kernels.common import extension
from ard_kernels.history_attention.torch_impl import attend_to_cache

refuses = extension.refuses_cpu


def append(k, v, cache_k, cache_v, start: int) -> None:
    """cache[:, :, start : start + L] = (k, v)."""
    B, H, L, D = k.shape
    views = map(extension.heads_view, (k, v, cache_k[:, :, start:], cache_v[:, :, start:]))
    extension.module.history_append(*views, B, H, L, D * k.element_size(), k.element_size(), torch.get_num_threads())


def forward(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale) -> torch.Tensor:
    """See torch_impl.forward."""
    append(k, v, cache_k, cache_v, start)
    return attend_to_cache(q, cache_k, cache_v, start + q.shape[2], sink_stop, window_start, scale)
