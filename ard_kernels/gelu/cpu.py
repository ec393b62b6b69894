"""gelu in C++ (csrc/gelu): passes pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common import extension

refuses = extension.refuses_cpu


def forward(x: Tensor, y: Tensor) -> None:
    """See backend.py."""
    how = x.numel(), extension.dtype_code(x.dtype), torch.get_num_threads()
    extension.module.gelu_forward(x.data_ptr(), y.data_ptr(), *how)


def backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """See backend.py."""
    how = x.numel(), extension.dtype_code(x.dtype), torch.get_num_threads()
    extension.module.gelu_backward(grad.data_ptr(), x.data_ptr(), dx.data_ptr(), *how)
