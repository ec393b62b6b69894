"""Block-causal attention in CUDA C++ (csrc/block_causal_attention): makes tile tables, passes pointers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

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


@lru_cache(maxsize=1024)
def _tables(
    shape_BHTD: torch.Size, itemsize: int, lengths: tuple[int, ...], window: int | None, sink: int,
    block: tuple[int, int], by_key: bool, device: torch.device,
) -> tuple[Schedule, tuple[int, ...]]:  # fmt: skip
    B, H, T, D = shape_BHTD
    made = schedule(lengths, T, window, sink, *block, by_key, device)
    group = heads_per_group(B * H, 2 * T * D * itemsize)
    return made, (*(table.data_ptr() for table in made), len(made.items), group)


def tables(
    q: Tensor, lengths: Sequence[int], window: int | None, sink: int, block: tuple[int, int], by_key: bool
) -> tuple[int, ...]:
    """The schedule of `tiles.py` as the extension takes it. `block`: rows and columns of a tile."""
    made, fields = _tables(q.shape, q.element_size(), tuple(lengths), window, sink, block, by_key, q.device)
    keep_if_captured(made)
    return fields


@on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Sequence[int], window: int | None, sink: int, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    B, H, T, D = q.shape
    device = q.device
    gpu, q, k, v = extension.gpu(device), *map(aligned, (q, k, v))
    views = tuple(map(extension.heads_view, (q, k, v, out)))
    sizes = B, H, T, scale, extension.dtype_code(q.dtype), D
    hopper, rows, columns = gpu.attention_forward_kernel(*views, *sizes, architecture(device), multiprocessors(device))
    made = tables(q, lengths, window, sink, (rows, columns), by_key=False)
    gpu.attention_forward(*views, lse.data_ptr(), made, *sizes, hopper, extension.stream(device))


@on_device
def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float,
) -> None:  # fmt: skip
    """See backend.py."""
    B, H, T, D = q.shape
    gpu = extension.gpu(q.device)
    block = gpu.attention_backward_block()
    delta = torch.empty_like(lse)
    inputs = tuple(map(aligned, (grad_out, q, k, v, out)))
    gpu.attention_backward(
        *map(extension.heads_view, (*inputs, dq, dk, dv)),
        lse.data_ptr(),
        delta.data_ptr(),
        tables(q, lengths, window, sink, block, by_key=False),
        tables(q, lengths, window, sink, block, by_key=True),
        B, H, T, scale, extension.dtype_code(q.dtype), D, extension.stream(q.device),
    )  # fmt: skip
