# mypy: no-strict-optional
# (Inputs that a call lacks are None, in groups that their types do not know.)
"""The adaLN family in CUDA C++ (csrc/segment_adaln/forward.cu, backward.cu): tables and launches.

Blocks take chunks as in triton_impl.py. Inputs may have any strides with a contiguous last dim: where rows do not start
on 16-byte boundaries the kernels are variants that read element by element, because a copy of an activation would cost
more than the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ard_kernels.common import extension
from ard_kernels.common.gpu_support import keep_if_captured, multiprocessors, on_device, shared_limit
from ard_kernels.common.segments import segment_offsets
from ard_kernels.segment_adaln.chunks import Chunks, chunks

MOST_CHANNELS = 8192
# Registers per thread by the compiler's report, of the kernels of 8 and 16 elements per thread.
REGISTERS = {"forward": {8: 96, 16: 128}, "backward": {8: 128, 16: 128}}
# Tokens of a chunk, at most; a chunk costs as much as OVERHEAD tokens to begin and to end.
TOKENS = {"forward": 32, "backward": 64}
OVERHEAD = 2


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why these kernels cannot serve this device, dtype and C; None when they can."""
    reason = extension.refuses_cuda(device, dtype)
    if reason or width is None:
        return reason
    if width % 8 or width > MOST_CHANNELS:
        return f"C is {width}; it takes multiples of 8 up to {MOST_CHANNELS}"
    # Backward, for what a block's threads hold: a token of grad_h and h, of branch and grad_y, which may be fp32, and
    # beyond 4096 channels an fp32 sum.
    step, sum_bytes = (512, 4) if width > 4096 else (256, 0)
    needs = -(-width // step) * step * (2 * dtype.itemsize + 8 + sum_bytes) + 512
    limit = shared_limit(device)
    if needs > limit:
        return f"C = {width} needs {needs} bytes of shared memory; a block of this GPU has {limit}"
    return None


def chunk_tokens(lengths: tuple[int, ...], batch: int, most: int, slots: int) -> int:
    """Tokens of a chunk, from 4 to `most`, for the shortest time of `slots` blocks at a time, by the model
    waves x (tokens + OVERHEAD); the larger of equals."""

    def time(tokens: int) -> int:
        blocks = batch * sum(-(-length // tokens) for length in lengths)
        return -(-blocks // slots) * (min(tokens, max(lengths)) + OVERHEAD)

    return min(range(most, 3, -1), key=time)


@lru_cache(maxsize=1024)
def _plan(
    lengths: tuple[int, ...], tokens: int, batch: int, channels: int, kernel: str, device: torch.device, few: int
) -> Chunks:
    """The tables for this shape; made once. few: multiprocessors."""
    each = tuple(stop - start for start, stop in pairwise(segment_offsets(lengths, tokens)))
    elements, threads, rows = extension.gpu(device).adaln_geometry(channels, kernel == "backward")
    blocks = max(1, 65536 // (REGISTERS[kernel][elements] * threads * rows))
    most = chunk_tokens(each, batch, TOKENS[kernel], blocks * few)
    return chunks(lengths, tokens, most, device)


def _work(kernel: str, like: Tensor, lengths: Sequence[int]) -> tuple:
    """What the extension takes of the tables. `like` (B, T, C) is any token tensor."""
    B, T, C = like.shape
    per_token, device = list(lengths) == [1], like.device
    segments = (T,) if per_token else tuple(lengths)
    tables = keep_if_captured(_plan(segments, T, B, C, kernel, device, multiprocessors(device)))
    counts = B, len(tables.chunks), len(tables.spans), per_token
    return tables.chunks.data_ptr(), tables.spans.data_ptr(), *counts


@on_device
def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, h: Tensor | None, y: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, lengths: Sequence[int], eps: float,
) -> None:  # fmt: skip
    """See backend.py."""
    work = _work("forward", x, lengths)
    views = map(extension.view, (x, branch, gate, shift, scale, weight, bias, h, y))
    extension.gpu(x.device).adaln_forward(
        *views, extension.pointer(mean), extension.pointer(rstd), eps, *x.shape[1:], work, shared_limit(x.device),
        extension.stream(x.device),
    )  # fmt: skip


@on_device
def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    dx: Tensor | None, dbranch: Tensor | None, dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, lengths: Sequence[int],
) -> None:  # fmt: skip
    """See backend.py."""
    like = h if h is not None else grad_h
    work = _work("backward", like, lengths)
    B, chunk_count, segments, per_token = work[2:]
    of_parameters = dweight is not None or dbias is not None
    if per_token:
        sums = 2 * of_parameters
    else:  # the kernels have sums of all that is there, or of nothing
        wanted = of_parameters or dgate is not None or dshift is not None or dscale is not None
        sums = wanted * ((gate is not None) + 2 * (grad_y is not None))
    shares = 0 if per_token else 2 * of_parameters
    workspace = like.new_empty(B * (chunk_count * sums + segments * shares) * like.shape[2], dtype=torch.float32)
    inputs = map(extension.view, (grad_h, grad_y, h, branch, gate, scale, weight, bias))
    grads = map(extension.view, (dx, dbranch, dgate, dshift, dscale, dweight, dbias))
    extension.gpu(like.device).adaln_backward(
        *inputs, extension.pointer(mean), extension.pointer(rstd), *grads, workspace.data_ptr(), sums, *like.shape[1:],
        work, shared_limit(like.device), extension.stream(like.device),
    )  # fmt: skip
