"""The `ard` operator library: how a room turns its schema, kernel, fake, gradient and FLOP formula into one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _get_tracing_state as jit_trace
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _len_torch_function_stack as function_modes
from torch._C._functorch import peek_interpreter_stack as transforms
from torch.autograd import _profiler_enabled as profiler_enabled
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("ard", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def define_op(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable | None = None,
) -> Callable:
    """Register `ard::<schema>` and return what calls it.

    `kernel` runs on every device (it dispatches on its `backend` argument). `setup_context(ctx, inputs, output)` and
    `backward(ctx, *grads)` are those of an autograd.Function; an op without them has no gradient.
    """
    name = schema.split("(", 1)[0]
    # Strides of inputs are part of the contract (packed views come without a copy), so the compiler must keep them.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ard::{name}", fake, lib=_library)
    packet = getattr(torch.ops.ard, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    op = packet.default
    if backward is None:
        return _directly(op, kernel, kernel)
    with_gradient = _gradient_function(kernel, backward, setup_context).apply
    _library.impl(name, _autograd_kernel(op, backward, setup_context), "Autograd")
    return _directly(op, kernel, with_gradient)


def _directly(op: Callable, kernel: Callable, with_gradient: Callable) -> Callable:
    """`op`, called without the dispatcher where nothing can tell the difference: that costs 15 to 30 us less.

    A tiny attention takes 40. What traces, counts, transforms or profiles gets the op itself.
    """

    def call(*inputs):
        if (
            is_compiling()
            or dispatch_modes()
            or function_modes()
            or transforms() is not None
            or jit_trace() is not None
            or profiler_enabled()
        ):
            return op(*inputs)
        needs_gradient = False
        for x in inputs:
            if isinstance(x, Tensor):
                if type(x) not in _PLAIN or x.is_meta or x.is_neg():
                    return op(*inputs)
                needs_gradient = needs_gradient or x.requires_grad
        if needs_gradient and torch.is_grad_enabled():
            return with_gradient(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*inputs)

    return call


def _gradient_function(run: Callable, run_backward: Callable, setup_context: Callable) -> type:
    """The autograd.Function that computes `run`. Gradients of gradients raise."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if (
                torch.is_grad_enabled()
            ):  # once_differentiable would drop the gradient in silence when grads are constants
                raise NotImplementedError("ard_kernels: gradients of gradients (create_graph=True) are not supported")
            return run_backward(ctx, *grads)

    return Gradient


def _autograd_kernel(op: Callable, run_backward: Callable, setup_context: Callable) -> Callable:
    """What `torch.library.register_autograd` makes, without its generic treatment of nested arguments.

    That costs 25 us per forward and backward, a quarter of the time of a small op.
    """
    with_gradient = _gradient_function(op, run_backward, setup_context).apply

    def kernel(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return with_gradient(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel
