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
    mutates: bool = False,
) -> Callable:
    """Register `ard::<schema>` and return its callable overload.

    `kernel` runs on every device (it dispatches on its `backend` argument). An op without `backward` raises when a
    gradient is asked through it: gradients of gradients are refused, never silently dropped. PyTorch takes no gradient
    formula for an op that mutates an argument: there the public function refuses.
    """
    name = schema.split("(", 1)[0]
    # Strides of inputs are part of the contract (packed views come without a copy), so the compiler must keep them.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ard::{name}", fake, lib=_library)
    if backward is None:

        def backward(ctx, *grads):
            raise NotImplementedError(f"ard_kernels: ard::{name} cannot be differentiated")

    if not mutates:
        torch.library.register_autograd(f"ard::{name}", backward, setup_context=setup_context, lib=_library)
    packet = getattr(torch.ops.ard, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default
