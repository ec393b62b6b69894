"""The `ard` operator library: how a room turns its schema, kernel, fake, gradient and FLOP formula into one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("ard", "DEF")


def define_op(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable | None = None,
) -> Callable:
    """Register `ard::<schema>` and return its callable overload.

    `kernel` runs on every device (it dispatches on its `backend` argument). `setup_context(ctx, inputs, output)` and
    `backward(ctx, *grads)` are those of an autograd.Function; an op without them has no gradient.
    """
    name = schema.split("(", 1)[0]
    # Strides of inputs are part of the contract (packed views come without a copy), so the compiler must keep them.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ard::{name}", fake, lib=_library)
    packet = getattr(torch.ops.ard, name)
    if backward is not None:
        _library.impl(name, _autograd_kernel(packet.default, backward, setup_context), "Autograd")
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default


def _autograd_kernel(op: Callable, run_backward: Callable, setup_context: Callable) -> Callable:
    """What `torch.library.register_autograd` makes, without its generic treatment of nested arguments.

    That costs 25 us per forward and backward, a quarter of the time of a small op. Gradients of gradients raise.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if (
                torch.is_grad_enabled()
            ):  # once_differentiable would drop the gradient in silence when grads are constants
                raise NotImplementedError(f"{op}: gradients of gradients (create_graph=True) are not supported")
            return run_backward(ctx, *grads)

    def kernel(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Gradient.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel
