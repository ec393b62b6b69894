"""Attention over segments in CUDA C++ (csrc/block_causal_attention): makes tile tables, passes pointers."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.block_causal_attention.tiles import Schedule, heads_per_group, schedule
from ard_kernels.common import extension
from ard_kernels.common.gpu_support import architecture, keep_if_captured, multiprocessors, on_device, shared_limit

# The head dims that are compiled; CMakeLists.txt has the same list, and a build says what it has.
HEAD_DIMS = (64, 72, 80, 96, 112, 128)


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why no CUDA kernel serves these tensors; None when one does. `width` is the head dim."""
    reason = extension.refuses_cuda(device, dtype)
    if reason is not None:
        return reason
    if dtype == torch.float32:
        return "its tensor-core kernels take bfloat16 and float16; float32 is served by the triton backend"
    if width is None:
        return None
    needs, limit = extension.gpu(device).attention_shared_bytes, shared_limit(device)
    if width not in needs:
        return f"head dim {width} is not compiled; expected one of {', '.join(map(str, needs))}"
    if needs[width] > limit:
        return f"head dim {width} needs {needs[width]} bytes of shared memory; a block of this GPU has {limit}"
    return None


def aligned(x_BHTD: Tensor) -> Tensor:
    """x itself when every row starts on 16 bytes, as the kernels' copies need; otherwise a contiguous copy."""
    batch, head, token, _ = x_BHTD.stride()
    if not ((batch | head | token) % 8 or x_BHTD.data_ptr() % 16):
        return x_BHTD
    strides = [stride for size, stride in zip(x_BHTD.shape[:-1], (batch, head, token), strict=True) if size > 1]
    if not (x_BHTD.data_ptr() % 16 or any(stride % 8 for stride in strides)):
        return x_BHTD
    return x_BHTD.clone(memory_format=torch.contiguous_format)


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """(B, H, H_kv, T_q, T_k), as the extension takes them."""
    return *q.shape[:2], k.shape[1], q.shape[2], k.shape[2]


@lru_cache(maxsize=1024)
def _tables(
    sizes: tuple[int, int, int, int, int], row_bytes: int, segments: Segments, block: tuple[int, int], by_key: bool,
    device: torch.device,
) -> tuple[Schedule, tuple[int, ...]]:  # fmt: skip
    B, H, kv_heads, T, k_tokens = sizes
    made = schedule(segments, T, k_tokens, *block, by_key, device)
    # What a row tile reads beside its rows: keys and values, which heads share, or the queries of all of these heads.
    heads, columns = (kv_heads, T * H // kv_heads) if by_key else (H, k_tokens * kv_heads // H)
    group = heads_per_group(B * heads, 2 * columns * row_bytes)
    return made, (*(table.data_ptr() for table in made), len(made.items), group)


def tables(q: Tensor, k: Tensor, segments: Segments, block: tuple[int, int], by_key: bool) -> tuple[int, ...]:
    """The schedule of `tiles.py` as the extension takes it. `block`: rows and columns of a tile."""
    made, fields = _tables(sizes(q, k), q.shape[3] * q.element_size(), segments, block, by_key, q.device)
    keep_if_captured(made)
    return fields


@on_device
def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> None:
    """See backend.py."""
    device = q.device
    gpu, q, k, v = extension.gpu(device), *map(aligned, (q, k, v))
    views = tuple(map(extension.heads_view, (q, k, v, out)))
    how = sizes(q, k), scale, extension.dtype_code(q.dtype), q.shape[3]
    hopper, rows, columns = gpu.attention_forward_kernel(*views, *how, architecture(device), multiprocessors(device))
    made = tables(q, k, segments, (rows, columns), by_key=False)
    gpu.attention_forward(*views, lse.data_ptr(), made, *how, hopper, extension.stream(device))


@on_device
def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, segments: Segments, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    gpu = extension.gpu(q.device)
    block = gpu.attention_backward_block()
    statistics = lse.new_empty(2, *lse.shape)
    grad_out, q, k, v, out = inputs = tuple(map(aligned, (grad_out, q, k, v, out)))
    gpu.attention_backward(
        *map(extension.heads_view, (*inputs, dq, dk, dv)),
        lse.data_ptr(),
        0 if grad_lse is None else grad_lse.data_ptr(),
        statistics.data_ptr(),
        tables(q, k, segments, block, by_key=False),
        tables(q, k, segments, block, by_key=True),
        sizes(q, k), scale, extension.dtype_code(q.dtype), q.shape[3], extension.stream(q.device),
    )  # fmt: skip
