# mypy: no-strict-optional
# (Inputs that an op lacks are None, in groups that their types do not know.)
"""The adaLN family on the C++ kernels of csrc/segment_adaln: passes pointers and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ard_kernels.common import extension
from ard_kernels.common.segments import segment_offsets

refuses = extension.refuses_cpu


def _segments(x_BTC: Tensor, lengths: Sequence[int]) -> Any:
    B, T, C = x_BTC.shape
    offsets = [] if len(lengths) == 1 else segment_offsets(lengths, T)
    return extension.module.Segments(B, T, C, lengths[0], offsets, torch.get_num_threads())


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, h: Tensor | None, y: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, lengths: Sequence[int], eps: float,
) -> None:  # fmt: skip
    """See backend.py."""
    views = map(extension.view, (x, branch, gate, shift, scale, weight, bias, h, y))
    statistics = extension.pointer(mean), extension.pointer(rstd)
    extension.module.segment_adaln_forward(_segments(x, lengths), *views, *statistics, eps)


def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    dx: Tensor | None, dbranch: Tensor | None, dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, lengths: Sequence[int],
) -> None:  # fmt: skip
    """See backend.py."""
    like = h if h is not None else grad_h
    memory = []

    def workspace(floats: int) -> int:
        memory.append(like.new_empty(floats, dtype=torch.float32))
        return memory[0].data_ptr()

    inputs = map(extension.view, (grad_h, grad_y, h, branch, gate, scale, weight, bias))
    statistics = extension.pointer(mean), extension.pointer(rstd)
    grads = map(extension.view, (dx, dbranch, dgate, dshift, dscale, dweight, dbias))
    extension.module.segment_adaln_backward(_segments(like, lengths), *inputs, *statistics, *grads, workspace)
