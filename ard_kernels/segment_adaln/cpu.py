"""The adaLN family on the C++ kernels of csrc/segment_adaln: allocates the outputs and passes pointers and strides."""

from __future__ import annotations

import torch

from ard_kernels.common import extension
from ard_kernels.common.segments import segment_offsets
from ard_kernels.segment_adaln.torch_impl import gradients, outputs

refuses = extension.refuses_cpu


def _segments(x_BTC: torch.Tensor, lengths):
    B, T, C = x_BTC.shape
    offsets = [] if len(lengths) == 1 else segment_offsets(lengths, T)
    return extension.module.Segments(B, T, C, lengths[0], offsets, torch.get_num_threads())


def forward(x, branch, gate, shift, scale, lengths, eps: float, y_dtype: torch.dtype | None):
    """See torch_impl.forward."""
    h, y, mean, rstd = outputs(x, branch, shift, y_dtype)
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
    grads = gradients(h, branch, gate, scale)
    floats = extension.module.segment_adaln_workspace(segments, gate is not None, scale is not None)
    workspace = like.new_empty(floats, dtype=torch.float32)
    extension.module.segment_adaln_backward(
        segments,
        *map(extension.view, (grad_h, grad_y, h, branch, gate, scale, *grads)),
        *(0 if statistic is None else statistic.data_ptr() for statistic in (mean, rstd)),
        workspace.data_ptr(),
    )
    return grads
