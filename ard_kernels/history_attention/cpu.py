"""The append of history attention in C++ (csrc/history_attention/cpu.cpp), before PyTorch's fused CPU attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common import extension

refuses = extension.refuses_cpu


def append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int) -> None:
    """See backend.py."""
    B, H, L, D = k.shape
    views = map(extension.heads_view, (k, v, cache_k[:, :, start:], cache_v[:, :, start:]))
    extension.module.history_append(*views, B, H, L, D * k.element_size(), k.element_size(), torch.get_num_threads())
