"""`ard::gelu` and its backward: schema, dispatch on the resolved backend, fake, gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, empty_like

from ard_kernels.common.arguments import check_tensor, described
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.dtypes import DTYPES, EXPECTED
from ard_kernels.common.library import define_op, saved_tensors
from ard_kernels.gelu import cpu

OP = "gelu"
register_backend(OP, "cpu", cpu.refuses)
register_backend(OP, "torch", serves_everything)


def composite(x: Tensor, backend: str = "torch") -> Tensor:
    """PyTorch's own."""
    return F.gelu(x, approximate="tanh")


def forward(x: Tensor, backend: str) -> Tensor:
    """y."""
    if backend == "torch":
        return composite(x)
    y = empty_like(x)
    if x.numel():
        cpu.forward(_alike(x, y), y)
    return y


def backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    """dx."""
    if backend == "torch":
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    dx = empty_like(x)
    if x.numel():
        cpu.backward(_alike(grad, dx), _alike(x, dx), dx)
    return dx


def _alike(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory order of `like`, which has no gaps: then elements are where they are in that."""
    return x if x.stride() == like.stride() else empty_like(like).copy_(x)


def check_input(x: Tensor) -> None:
    """ValueError unless x is a dense tensor of a dtype that the op takes."""
    check_tensor(OP, "x", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"{OP}: x has dtype {described(x.dtype)}; expected {EXPECTED}")


def _check(x: Tensor, backend: str) -> None:
    check_input(x)
    check_backend(OP, backend, x.device, x.dtype, 0)


def _check_backward(grad: Tensor, x: Tensor, backend: str) -> None:
    _check(x, backend)
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        got = f"{grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
        raise ValueError(f"{OP}: grad is {got}; expected x's {x.dtype} of shape {tuple(x.shape)} on {x.device}")


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return backward_op(grad, *saved_tensors(ctx), ctx.backend), None


backward_op = define_op(
    "gelu_backward(Tensor grad, Tensor x, str backend) -> Tensor",
    backward,
    lambda grad, x, backend: empty_like(x),
    check=_check_backward,
)
gelu_op = define_op(
    "gelu(Tensor x, str backend) -> Tensor",
    forward,
    lambda x, backend: empty_like(x),
    check=_check,
    backward=_autograd,
    setup_context=_setup_context,
    composite=composite,
)
