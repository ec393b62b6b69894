"""The adaLN family on the C++ kernels of csrc/segment_adaln: allocates the outputs and passes pointers and strides."""

from __future__ import annotations

import torch

from ard_kernels import extension
from ard_kernels.segments import segment_offsets

refuses = extension.refuses_cpu


def _segments(x_BTC: torch.Tensor, lengths):
    B, T, C = x_BTC.shape
    offsets = [] if len(lengths) == 1 else segment_offsets(lengths, T)
    return extension.module.Segments(B, T, C, lengths[0], offsets, torch.get_num_threads())


def _empty(x: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return None if x is None else x.new_empty(x.shape, dtype=dtype)


def forward(x, branch, gate, shift, scale, lengths, eps: float, y_dtype: torch.dtype | None):
    """See torch_impl.forward."""
    h = _empty(branch, x.dtype)
    y = mean = rstd = None
    if shift is not None:
        y = _empty(x, y_dtype)
        mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    extension.module.segment_adaln_forward(
        _segments(x, lengths),
        *map(extension.view, (x, branch, gate, shift, scale, h, y)),
        *(0 if statistic is None else statistic.data_ptr() for statistic in (mean, rstd)),
        eps,
    )
    return h, y, mean, rstd


def backward(grad_h, grad_y, h, branch, gate, scale, mean, rstd, lengths):
    """See torch_impl.backward."""
    like = h if h is not None else grad_h
    segments = _segments(like, lengths)
    dx = _empty(h)
    dbranch, dgate, dshift, dscale = _empty(branch), _empty(gate), _empty(scale), _empty(scale)
    floats = extension.module.segment_adaln_workspace(segments, gate is not None, scale is not None)
    workspace = like.new_empty(floats, dtype=torch.float32)
    extension.module.segment_adaln_backward(
        segments,
        *map(extension.view, (grad_h, grad_y, h, branch, gate, scale, dx, dbranch, dgate, dshift, dscale)),
        *(0 if statistic is None else statistic.data_ptr() for statistic in (mean, rstd)),
        workspace.data_ptr(),
    )
    return dx, dbranch, dgate, dshift, dscale
