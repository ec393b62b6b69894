"""gelu in C++ (csrc/gelu): passes pointers of tensors with the same strides and no gaps, not empty."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common import extension

refuses = extension.refuses_cpu


def forward(x: Tensor, y: Tensor) -> None:
    """y = gelu(x)."""
    how = x.numel(), extension.dtype_code(x.dtype), torch.get_num_threads()
    extension.module.gelu_forward(x.data_ptr(), y.data_ptr(), *how)


def backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """dx = grad * gelu'(x)."""
    how = x.numel(), extension.dtype_code(x.dtype), torch.get_num_threads()
    extension.module.gelu_backward(grad.data_ptr(), x.data_ptr(), dx.data_ptr(), *how)
