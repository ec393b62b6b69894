"""PyTorch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common.autocast import without_autocast


@without_autocast
def forward(x: Tensor, y: Tensor) -> None:
    """See backend.py."""
    torch.ops.aten.gelu.out(x, approximate="tanh", out=y)


@without_autocast
def backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """See backend.py."""
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=dx)
