"""The `ard` operator library: how a room turns its schema, kernel, fake, gradient and FLOP formula into one op.

What each way of differentiating gets:

    reverse mode, torch.func.grad / vjp     the op's `backward`
    forward mode, torch.func.jvp            `composite`: the op composed of PyTorch ops, whose derivatives of any order
                                            and mode PyTorch knows. Backend "torch" only, which automatic choice takes
                                            while a dual level is open; another one raises
    gradients of gradients                  raise, but through a composite
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from ard_kernels.common import record
from ard_kernels.common.autocast import without_autocast

_Asks = TypeVar("_Asks", bound=Callable)

_library = torch.library.Library("ard", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def private(name: str) -> Any:
    """torch.<name>; None in a version of torch that lacks it."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def constant_in_graphs(ask: _Asks) -> _Asks:
    """Have Dynamo call `ask`, instead of tracing it, and keep the answer.

    This is all that torch.compiler.assume_constant_result does after importing the compiler, which a plain import of
    this library shall not.
    """
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


# Who may watch, trace or transform an op: non-zero, not None or True while somebody does.
_jit_trace = private("_C._get_tracing_state")
_dispatch_modes = private("_C._len_torch_dispatch_stack")
_function_modes = private("_C._len_torch_function_stack")
_profiler_enabled = private("autograd._profiler_enabled")
_transforms = private("_C._functorch.peek_interpreter_stack")
# What calls an op below its autograd kernel. Without it PyTorch's `register_autograd` is used: slower, no torch.func.
_below_autograd = private("_C._AutoDispatchBelowAutograd")
_is_zero = private("_is_zerotensor")
_hooks_of_saved = private("_C._autograd._top_saved_tensors_default_hooks")
_KNOWN = all((_jit_trace, _dispatch_modes, _function_modes, _profiler_enabled, _transforms, _below_autograd))
_KNOWN = _KNOWN and hasattr(forward_ad, "_current_level")
# Where one of them cannot be asked, every call takes the dispatcher; so it does for who sets ARD_DISPATCH=1.
DIRECT = _KNOWN and os.environ.get("ARD_DISPATCH", "0") != "1"


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that a tensor may carry a tangent."""
    return not is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0


def transformed() -> bool:
    """Whether a transform of torch.func is running."""
    return _transforms is not None and _transforms() is not None


def define_op(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    check: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    composite: Callable | None = None,
    flops: Callable | None = None,
    reads_host: bool = False,
    normal: Callable | None = None,
) -> Callable:
    """Register `ard::<schema>` and return what calls it.

    `kernel` runs on every device; its last argument is the backend. `check` raises ValueError for inputs that the
    kernel would not survive: `torch.ops.ard.*` asks it, a public function has checked what it passes.
    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are those of an autograd.Function, which reads
    `saved_tensors(ctx)`. `flops` gets the op's inputs, tensors as they are after the call. `reads_host`: what is
    launched depends on a tensor of the host, so that torch.compile must not replay it in a CUDA graph.
    `normal(*inputs)`: inputs of a call of the same work, which `record.py` notes in place of these.
    """
    name = schema.split("(", 1)[0]
    if record.RECORDING:
        kernel = record.recorded(name, kernel, normal)

    def checked(*inputs: Any) -> Any:
        if check is not None:
            check(*inputs)
        return kernel(*inputs)

    def checked_fake(*inputs: Any) -> Any:
        """Also what meta tensors reach outside of any mode, and beside them may be tensors that are not."""
        if check is not None and all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor)):
            check(*inputs)
        return fake(*inputs)

    # Strides of inputs are part of the contract (packed views come without a copy), so the compiler must keep them.
    tags = [torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag]
    tags += [torch.Tag.cudagraph_unsafe] if reads_host and hasattr(torch.Tag, "cudagraph_unsafe") else []
    _library.define(schema, tags=tags)
    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ard::{name}", checked_fake, lib=_library)
    packet = getattr(torch.ops.ard, name)
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(lambda *inputs, out_val=None, **kwargs: flops(*inputs, **kwargs))
    op = packet.default
    if backward is None or setup_context is None:
        setup_context, backward = _refuse_gradient(name)
    if _below_autograd:
        _library.impl(name, _autograd_kernel(name, op, backward, setup_context, composite), "Autograd")
    elif "!" not in schema:  # the op that writes into its inputs has no gradient, and its public function refuses one
        torch.library.register_autograd(f"ard::{name}", backward, setup_context=setup_context, lib=_library)
    if _is_zero:
        _library.impl(name, lambda *inputs: op(*map(_materialized, inputs)), "ZeroTensor")
    gradient = _gradient_function(kernel, backward, setup_context)
    # Function.apply looks for what torch.func does and has left in the inputs, as the call itself does: 5 us.
    with_gradient = super(torch.autograd.Function, gradient).apply  # type: ignore[misc]
    arguments = schema.partition("(")[2].rpartition(") -> ")[0].split(", ")
    places = [i for i, argument in enumerate(arguments) if argument.startswith("Tensor")]
    return _directly(op, kernel, with_gradient, places)


def _directly(op: Callable, kernel: Callable, with_gradient: Callable, places: Sequence[int]) -> Callable:
    """`op`, called without the dispatcher where nothing can tell the difference: that costs 15 to 30 us less.

    places: which arguments are tensors, or may be.

    A tiny attention takes 40. What traces, counts, transforms or profiles gets the op itself. Two things cannot be
    noticed from here, an ExecutionTraceObserver and kernels that a user has registered for `ard::*`: ARD_DISPATCH=1.
    """
    if not DIRECT:
        return op
    # torch.func brings autocast back for the levels below, whatever the op switches off inside.
    transformed = without_autocast(op)

    def call(*inputs: Any) -> Any:
        if is_compiling() or _dispatch_modes() or _function_modes() or _jit_trace() is not None or _profiler_enabled():
            return op(*inputs)
        if forward_ad._current_level >= 0 or _transforms() is not None:
            return transformed(*inputs)
        differentiated = False
        for i in places:
            x = inputs[i]
            if x is None:
                continue
            if not _plain(x):
                return op(*inputs)
            differentiated |= x.requires_grad
        if differentiated and torch.is_grad_enabled():
            return with_gradient(*inputs)
        with _below_autograd():
            return kernel(*inputs)

    return call


def _plain(x: Tensor) -> bool:
    """Whether x is memory as it stands: no subclass, negated view or zero tensor of autograd, and not on meta."""
    try:
        return type(x) in _PLAIN and not x.is_neg() and (x.data_ptr() != 0 or not (x.numel() or x.is_meta))
    except RuntimeError:  # what torch.func has left has no pointer
        return False


def _materialized(x: object) -> object:
    """PyTorch's zero tensors of autograd have no memory to point to."""
    return torch.zeros_like(x) if isinstance(x, Tensor) and _is_zero(x) else x


def _refuse_gradient(name: str) -> tuple[Callable, Callable]:
    """setup_context and backward of an op without a gradient: one that is asked for raises instead of getting lost."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"ard_kernels: {name} has no gradient; gradients of gradients are not supported")

    return lambda ctx, inputs, output: None, backward


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, as they were saved: kernels read them as memory, and hooks may have made others of them.

    Raises ValueError for another dtype, shape or device; other strides are mended.
    """
    tensors, as_saved = ctx.saved_tensors, getattr(ctx, "as_saved", None)
    return tensors if as_saved is None else tuple(map(_as_saved, tensors, as_saved))


def _as_saved(x: Tensor | None, kind: tuple | None) -> Tensor | None:
    if x is None or kind is None:
        return x
    *expected, strides = kind
    got: list[Any] = [x.dtype, x.shape, x.device]
    if got != expected:
        raise ValueError(
            f"ard_kernels: a hook of saved tensors has given back {_told(*got)}; expected {_told(*expected)}"
        )
    return x if x.stride() == strides or x.is_contiguous() else x.contiguous()


def _told(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> str:
    return f"{dtype} of shape {tuple(shape)} on {device}"


def _gradient_function(run: Callable, run_backward: Callable, setup_context: Callable) -> type[torch.autograd.Function]:
    """The autograd.Function that computes `run`."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with _below_autograd():
                output = run(*inputs)
            setup_context(ctx, inputs, output)
            # Hooks of single tensors (`_raw_saved_tensors`) cannot be seen from here.
            if _hooks_of_saved is None or _hooks_of_saved(True):  # True: but for those that a compiler traces
                ctx.as_saved = [
                    None if x is None else (x.dtype, x.shape, x.device, x.stride()) for x in ctx.to_save or ()
                ]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return run_backward(ctx, *grads)

    return Gradient


def _autograd_kernel(
    name: str, op: Callable, run_backward: Callable, setup_context: Callable, composite: Callable | None
) -> Callable:
    """What `torch.library.register_autograd` makes, with tangents, and without its generic treatment of arguments.

    That costs 25 us per forward and backward, a quarter of the time of a small op.
    """
    gradient = _gradient_function(op, run_backward, setup_context)
    # Under torch.func this kernel is called once per level, for that level alone; Function.apply would do all levels.
    level_gradient = _gradient_function(_on_lower_levels(op), run_backward, setup_context)
    of_this_level = super(torch.autograd.Function, level_gradient).apply  # type: ignore[misc]

    def kernel(*inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        in_transform = transformed()
        may_be_dual = in_transform or getattr(forward_ad, "_current_level", 0) >= 0
        if may_be_dual and any(forward_ad.unpack_dual(x, level=0).tangent is not None for x in tensors):
            return _with_tangents(name, composite, inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            if not in_transform:
                return gradient.apply(*inputs)
            with _functorch("enable_single_level_autograd_function")():
                return of_this_level(*inputs)
        with _below_autograd():
            return op(*inputs)

    return kernel


def _on_lower_levels(op: Callable) -> Callable:
    """`op` inside an autograd.Function of one level, which has switched off what the levels below record."""

    def run(*inputs: Any) -> Any:
        with torch.enable_grad(), _functorch("_set_fwd_grad_enabled")(True):
            return op(*inputs)

    return run


def _with_tangents(name: str, composite: Callable | None, inputs: tuple) -> Any:
    """The op on inputs of which some carry a tangent. Its last argument is the backend."""
    if composite is None:
        raise NotImplementedError(f"ard_kernels: {name} has no forward-mode derivative")
    if inputs[-1] != "torch":
        raise NotImplementedError(
            f"ard_kernels: {name} on backend {inputs[-1]!r} has no forward-mode derivative; expected backend 'torch', "
            "which is the automatic choice outside of torch.compile"
        )
    return composite(*inputs)


def _functorch(name: str) -> Callable:
    """What PyTorch's own autograd.Function uses under torch.func."""
    try:
        return getattr(importlib.import_module("torch._functorch.autograd_function"), name)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError("ard_kernels: torch.func.grad is not supported with this version of torch") from error
