"""Attention over segments in C++ (csrc/block_causal_attention/cpu*): makes tiles, passes pointers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.cpu_tiles import make_tiles
from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.common import extension
from ard_kernels.common.library import constant_in_graphs, private

refuses = extension.refuses_cpu


@constant_in_graphs
def _torch_has_bf16_products() -> bool:
    """Whether PyTorch's kernels multiply bf16 by AMX here."""
    has_amx = private("cpu._is_amx_tile_supported")
    return has_amx is not None and has_amx() and extension.restrained_isa() in (None, "avx512")


def measured_slower(tensors: Sequence[Tensor], dtype: torch.dtype, lengths: Sequence[int]) -> str | None:
    """The backend cpu where PyTorch's kernel is the faster one, of tensors that autocast makes `dtype`; for `choose`.

    With bf16 and segments of 256 tokens its forward takes 0.7 of our time on a chip with AMX, at 64 tokens 1.2, its
    forward and backward 1.3 to 7 times ours. With AVX2 alone, in fp32 and fp16 it is nowhere faster, and chips with
    AVX512-BF16 but no AMX were not measured: docs/performance.md.
    """
    if dtype != torch.bfloat16 or max(lengths) < 128 or not _torch_has_bf16_products():
        return None
    return None if torch.is_grad_enabled() and any([x.requires_grad for x in tensors]) else "cpu"


@lru_cache(maxsize=1024)
def _tiles(segments: Segments, q_tokens: int, k_tokens: int, whole: bool) -> Any:
    return extension.module.AttentionTiles(*make_tiles(segments, q_tokens, k_tokens, whole))


def _run(kernel: Callable[..., bool], q: Tensor, k: Tensor, segments: Segments, scale: float, *rest: Any) -> None:
    """The kernel; once more, with a tile for each segment, where a mask's weights of 0 have met an infinity or NaN."""
    (B, H, q_tokens, D), (_, H_kv, k_tokens, _) = q.shape, k.shape
    how = (B, H, H_kv, q_tokens, k_tokens, D), extension.dtype_code(q.dtype), scale, torch.get_num_threads()
    if not kernel(_tiles(segments, q_tokens, k_tokens, False), *how, *rest):
        kernel(_tiles(segments, q_tokens, k_tokens, True), *how, *rest)


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> None:
    """See backend.py."""
    views = map(extension.heads_view, (q, k, v, out))
    _run(extension.module.attention_forward, q, k, segments, scale, *views, lse.data_ptr())


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, segments: Segments, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    forward_views = map(extension.heads_view, (q, k, v, out))
    views = map(extension.heads_view, (dq, dk, dv))
    grads = extension.heads_view(grad_out), extension.pointer(grad_lse)
    _run(extension.module.attention_backward, q, k, segments, scale, *forward_views, lse.data_ptr(), *grads, *views)
