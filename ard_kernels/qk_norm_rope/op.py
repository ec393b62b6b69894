"""The op behind `qk_norm_rope`: schema, dispatch on the resolved backend, fake, gradient.

One op serves both public functions: x is q or k, (B, H, T, D), whose parameters are then q_weight and q_bias; or a
packed (B, T, 3, H, D), of which q and k are done and v is copied. What a call lacks is None as an input, and an empty
tensor as a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.common import triton_support
from ard_kernels.common.arguments import described
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.library import define_op, saved_tensors
from ard_kernels.qk_norm_rope import cpu, cuda, spec, torch_impl
from ard_kernels.qk_norm_rope.backend import Kernels
from ard_kernels.qk_norm_rope.spec import Rule, sections

if TYPE_CHECKING:
    from ard_kernels.qk_norm_rope import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.qk_norm_rope.triton_impl")

OP = "qk_norm_rope"
KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl, "cpu": cpu, "torch": torch_impl}
register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "triton", triton_support.refuses)
register_backend(OP, "cpu", cpu.refuses)
register_backend(OP, "torch", serves_everything)

Parameters = tuple[Tensor | None, Tensor | None]  # of q, of k


def _each(statistic: Tensor, count: int) -> list[Tensor | None]:
    """Of every section, or None."""
    return list(statistic.unbind(0)) if statistic.dim() == 4 else [None] * count


def _normed(x: Tensor) -> int:
    """Sections that are normalised and turned."""
    return 1 if x.dim() == 4 else 2


def forward(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: str, over_all: bool, half: bool, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean and rstd."""
    rule = Rule(norm, over_all, half, eps)
    y, (mean, rstd) = spec.empty_like(x), spec.empty_statistics(x, rule)
    if x.numel():
        count = _normed(x)
        inputs, outputs = sections(x), sections(y)
        parameters = (q_weight, k_weight)[:count], (q_bias, k_bias)[:count]
        for part in zip(inputs[:count], outputs[:count], *parameters, _each(mean, count), _each(rstd, count),
                        strict=True):  # fmt: skip
            own_x, own_y, weight, bias, own_mean, own_rstd = part
            KERNELS[backend].forward(own_x, own_y, weight, bias, cos, sin, own_mean, own_rstd, rule)
        for own_x, own_y in zip(inputs[count:], outputs[count:], strict=True):
            own_y.copy_(own_x)
    return y, mean, rstd


def backward(
    grad_y: Tensor, x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, mean: Tensor, rstd: Tensor, norm: str,
    over_all: bool, half: bool, eps: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx and the gradients of q_weight, k_weight, q_bias, k_bias."""
    rule, count, grad_y = Rule(norm, over_all, half, eps), _normed(x), spec.dense_last(grad_y)
    dx, *dparameters = _gradients(x, q_weight, k_weight, q_bias, k_bias)
    if not x.numel():  # sums over no tokens
        return dx, *(grad.zero_() for grad in dparameters)
    dweights, dbiases = ([g if g.numel() else None for g in dparameters[i : i + count]] for i in (0, 2))
    of_sections = map(sections, (grad_y, x, dx))
    statistics = _each(mean, count), _each(rstd, count)
    parts = (each[:count] for each in of_sections)
    for part in zip(*parts, (q_weight, k_weight)[:count], *statistics, dweights, dbiases, strict=True):
        own_grad, own_x, own_dx, weight, own_mean, own_rstd, dweight, dbias = part
        KERNELS[backend].backward(own_grad, own_x, weight, cos, sin, own_mean, own_rstd, own_dx, dweight, dbias, rule)
    if x.dim() == 5:
        dx[:, :, 2].copy_(grad_y[:, :, 2])
    return dx, *dparameters


def _gradients(x: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    """Memory for dx and for each parameter's gradient; an empty tensor where there is none."""
    return [spec.empty_like(x), *(x.new_empty(0) if p is None else torch.empty_like(p) for p in parameters)]


def _check(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: str, over_all: bool, half: bool, eps: float, backend: str,
) -> None:  # fmt: skip
    """What `torch.ops.ard` is called with; a public function has checked its own."""
    packed = x.dim() == 5
    spec.check_x(OP, "x", x, "packed" if packed else "bhtd")
    over, pairs = spec.OVER[over_all], spec.PAIRS[half]
    rule = spec.check_rule(OP, None if norm == "none" else norm, over, pairs, eps)
    B, T, H, _ = sections(x)[0].shape
    named = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, parameter in named.items():
        if parameter is not None and name[0] == "k" and not packed:
            raise ValueError(f"{OP}: {name} is {described(parameter)}; expected None with x (B, H, T, D)")
        spec.check_parameter(OP, name, parameter, rule, H, x)
    if cos is not None and cos.dim() != 4:
        raise ValueError(f"{OP}: cos has shape {tuple(cos.shape)}; expected (B or 1, L, H or 1, P)")
    length = cos.shape[1] if cos is not None and cos.shape[1] else None
    spec.check_tables(OP, cos, sin, length, x, B, T, (H,))
    for name, tensor in {"x": x, "cos": cos, "sin": sin, **named}.items():
        if tensor is not None and tensor.numel() and spec.dense_last(tensor) is not tensor:
            raise ValueError(f"{OP}: {name} has strides {tensor.stride()}; expected a contiguous last dim")
    check_backend(OP, backend, x.device, x.dtype, H * x.shape[-1])


def _check_backward(
    grad_y: Tensor, x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, mean: Tensor, rstd: Tensor, norm: str,
    over_all: bool, half: bool, eps: float, backend: str,
) -> None:  # fmt: skip
    _check(x, q_weight, k_weight, q_bias, k_bias, cos, sin, norm, over_all, half, eps, backend)
    if grad_y.shape != x.shape or grad_y.dtype != x.dtype or grad_y.device != x.device:
        raise ValueError(f"{OP}: grad_y is {described(grad_y)}; expected x's {tuple(x.shape)}, {x.dtype}")
    expected = spec.empty_statistics(x.to("meta"), Rule(norm, over_all, half, eps))
    for name, given, like in zip(("mean", "rstd"), (mean, rstd), expected, strict=True):
        if (
            given.shape != like.shape
            or given.dtype != like.dtype
            or given.device != x.device
            or not given.is_contiguous()
        ):
            raise ValueError(
                f"{OP}: {name} is {described(given)} on {given.device}; expected contiguous {like.dtype} "
                f"{tuple(like.shape)} on {x.device}"
            )


def _fake(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: str, over_all: bool, half: bool, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return spec.empty_like(x), *spec.empty_statistics(x, Rule(norm, over_all, half, eps))


def _backward_fake(
    grad_y: Tensor, x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, mean: Tensor, rstd: Tensor, norm: str,
    over_all: bool, half: bool, eps: float, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_gradients(x, q_weight, k_weight, q_bias, k_bias))


def _composite(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: str, over_all: bool, half: bool, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule, each, ys = Rule(norm, over_all, half, eps), sections(x), []
    for own_x, weight, bias in zip(each, (q_weight, k_weight), (q_bias, k_bias), strict=False):
        ys.append(torch_impl.section(own_x, weight, bias, cos, sin, rule)[0].to(x.dtype))
    y = ys[0].transpose(1, 2) if x.dim() == 4 else torch.stack([*ys, each[2]], 2)
    mean, rstd = spec.empty_statistics(x.detach(), rule)  # nobody reads them
    return y, mean.zero_(), rstd.zero_()


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.norm, ctx.over_all, ctx.half, ctx.eps, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mean, rstd)


def _autograd(ctx: Any, grad_y: Tensor | None, _grad_mean: None, _grad_rstd: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 12
    saved = saved_tensors(ctx)
    dx, *grads = backward_op(grad_y, *saved, ctx.norm, ctx.over_all, ctx.half, ctx.eps, ctx.backend)
    parameters = (None if p is None else grad for p, grad in zip(saved[1:5], grads, strict=True))
    return dx, *parameters, *(None,) * 7


_INPUTS = "Tensor x, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin"
_RULE = "str norm, bool over_all, bool half, float eps, str backend"
backward_op = define_op(
    f"qk_norm_rope_backward(Tensor grad_y, {_INPUTS}, Tensor mean, Tensor rstd, {_RULE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    check=_check_backward,
)
forward_op = define_op(
    f"qk_norm_rope({_INPUTS}, {_RULE}) -> (Tensor, Tensor, Tensor)",
    forward,
    _fake,
    check=_check,
    backward=_autograd,
    setup_context=_setup,
    composite=_composite,
)
