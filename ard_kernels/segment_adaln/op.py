# mypy: no-strict-optional
# (Inputs that an op lacks are None, in groups that their types do not know.)
"""The op of the adaLN family: schema, dispatch on the resolved backend, fake, gradient.

One op and its backward serve the three public functions, as those of a backend do; what a call lacks is None, inputs
and results alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.dtypes import DTYPES, accumulation_dtype
from ard_kernels.common.library import define_op, saved_tensors
from ard_kernels.common.segments import segment_count
from ard_kernels.segment_adaln import cpu, cuda, spec, torch_impl
from ard_kernels.segment_adaln.backend import Kernels
from ard_kernels.segment_adaln.torch_impl import Gradients, Outputs

if TYPE_CHECKING:
    from ard_kernels.segment_adaln import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.segment_adaln.triton_impl")

OP = "segment_adaln"
# They write into outputs and gradients allocated here; the torch backend's are what its PyTorch ops make.
KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl, "cpu": cpu}

for _op in ("adaln_modulate", "gate_residual_adaln", "gate_residual"):
    register_backend(_op, "cuda", cuda.refuses)
    register_backend(_op, "triton", triton_support.refuses)
    register_backend(_op, "cpu", cpu.refuses)
    register_backend(_op, "torch", serves_everything)


def _empty_like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous. (new_empty(x.shape) takes three times as long on the host.)"""
    return None if x is None else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _outputs(x: Tensor, branch: Tensor | None, norm: str | None, y_dtype: torch.dtype) -> Outputs:
    """Memory for h, y, mean, rstd."""
    h = _empty_like(branch, x.dtype)
    if norm is None:
        return h, None, None, None
    rstd = x.new_empty(*x.shape[:2], dtype=accumulation_dtype(x.dtype))
    return h, _empty_like(x, y_dtype), torch.empty_like(rstd) if norm == "layer" else None, rstd


def _gradients(
    h: Tensor | None, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, lengths: Sequence[int], row_dtype: torch.dtype | None, wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Memory for dx, dbranch, dgate, dshift, dscale, dweight, dbias."""
    of_gate, of_shift, of_scale, of_weight, of_bias = wanted
    dshift = None
    if of_shift and scale is None:
        shape_BSC = h.shape[0], segment_count(lengths, h.shape[1]), h.shape[2]
        dshift = h.new_empty(shape_BSC, dtype=row_dtype)
    elif of_shift:
        dshift = _empty_like(scale)
    return (
        _empty_like(h), _empty_like(branch), _empty_like(gate) if of_gate else None, dshift,
        _empty_like(scale) if of_scale else None, _empty_like(weight) if of_weight else None,
        _empty_like(bias) if of_bias else None,
    )  # fmt: skip


def _check(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], norm: str | None, eps: float,
    y_dtype: torch.dtype, backend: str,
) -> None:  # fmt: skip
    """What `torch.ops.ard` is called with; a public function has checked its own."""
    rows = {"gate": gate, "shift": shift, "scale": scale}
    spec.check_raw(OP, {"x": x, "branch": branch}, rows, norm, weight, bias, lengths)
    if y_dtype not in DTYPES or y_dtype == torch.float64 != x.dtype:
        raise ValueError(f"{OP}: y_dtype is {y_dtype}; expected float32, bfloat16, float16, or float64 as x")
    _check_groups({"branch": branch}, {"gate": gate})
    _check_groups({"norm": norm}, {"shift": shift, "scale": scale, "weight": weight, "bias": bias})
    if norm is not None:
        spec.check_eps(OP, eps)
    elif branch is None:
        raise ValueError(f"{OP}: branch and norm are None; expected one")
    check_backend(public_name(branch, norm), backend, x.device, x.dtype, x.shape[-1])


def _check_groups(needed: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError where something is given and what it needs is not."""
    for name, value in needed.items():
        for other, with_it in given.items():
            if value is None and with_it is not None:
                raise ValueError(f"{OP}: {name} is None; expected one beside {other}")


def public_name(branch: Tensor | None, norm: str | None) -> str:
    """The public function that calls the op with these."""
    return "gate_residual" if norm is None else "adaln_modulate" if branch is None else "gate_residual_adaln"


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], norm: str | None, eps: float,
    y_dtype: torch.dtype, backend: str,
) -> Outputs:  # fmt: skip
    """h, y, mean, rstd; None without a branch, a norm, a LayerNorm."""
    if backend == "torch":
        return torch_impl.forward(x, branch, gate, shift, scale, weight, bias, lengths, norm, eps, y_dtype)
    made = _outputs(x, branch, norm, y_dtype)
    if x.numel():
        KERNELS[backend].forward(x, branch, gate, shift, scale, weight, bias, *made, lengths, eps)
    return made


def _fake(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], norm: str | None, eps: float,
    y_dtype: torch.dtype, backend: str,
) -> Outputs:  # fmt: skip
    return _outputs(x, branch, norm, y_dtype)


def _check_backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    lengths: Sequence[int], row_dtype: torch.dtype | None, wanted: Sequence[bool], backend: str,
) -> None:  # fmt: skip
    norm = None if h is None else "rms" if mean is None else "layer"
    tokens = {"h": h, "grad_h": _dense(grad_h), "branch": branch, "grad_y": _dense(grad_y)}  # the first: of x's dtype
    like = spec.check_raw(OP, tokens, {"gate": gate, "scale": scale}, norm, weight, bias, lengths)
    if norm is None:
        _check_groups({"grad_h": grad_h}, {"branch": branch})
    else:
        spec.check_statistics(OP, like, **({"rstd": rstd} if mean is None else {"mean": mean, "rstd": rstd}))
    _check_groups({"grad_y": grad_y}, {"h": h})
    _check_groups({"h": h}, {"grad_y": grad_y, "scale": scale, "weight": weight, "bias": bias, "mean": mean})
    _check_groups({"branch": branch}, {"gate": gate})
    _check_groups({"gate": gate}, {"branch": branch})
    present = gate, row_dtype if h is not None else None, scale, weight, bias
    if len(wanted) != 5 or any(want and x is None for want, x in zip(wanted, present, strict=True)):
        raise ValueError(f"{OP}: wanted is {list(wanted)}; expected true for what is there: gate, shift, ..., bias")
    fits = row_dtype in DTYPES and (scale is None or row_dtype == scale.dtype)
    if row_dtype is not None and (not fits or row_dtype == torch.float64 != like.dtype):
        raise ValueError(f"{OP}: row_dtype is {row_dtype}; expected a float dtype equal to scale's, float64 as x only")
    check_backend(public_name(branch, norm), backend, like.device, like.dtype, like.shape[-1])


def _backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    lengths: Sequence[int], row_dtype: torch.dtype | None, wanted: Sequence[bool], backend: str,
) -> Gradients:  # fmt: skip
    """dx, dbranch, dgate, dshift, dscale, dweight, dbias; see `Kernels.backward`."""
    inputs = _dense(grad_h), _dense(grad_y), h, branch, gate, scale, weight, bias, mean, rstd
    if backend == "torch":
        return torch_impl.backward(*inputs, lengths, row_dtype, wanted)
    made = _gradients(h, branch, gate, scale, weight, bias, lengths, row_dtype, wanted)
    if (h if h is not None else grad_h).numel():
        KERNELS[backend].backward(*inputs, *made, lengths)
        return made
    for grad in made:  # sums over no tokens
        if grad is not None:
            grad.zero_()
    return made


def _dense(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()


def _backward_fake(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    lengths: Sequence[int], row_dtype: torch.dtype | None, wanted: Sequence[bool], backend: str,
) -> Gradients:  # fmt: skip
    return _gradients(h, branch, gate, scale, weight, bias, lengths, row_dtype, wanted)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, branch, gate, shift, scale, weight, bias, ctx.lengths, norm, _, _, ctx.backend = inputs
    h, _, mean, rstd = output
    if mean is not None:
        ctx.mark_non_differentiable(mean, rstd)
    elif rstd is not None:
        ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.row_dtype = None if shift is None else shift.dtype
    normed = None if norm is None else x if h is None else h
    ctx.save_for_backward(normed, branch if gate is not None else None, gate, scale, weight, bias, mean, rstd)


def _autograd(
    ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None, _mean: None, _rstd: None
) -> tuple[Tensor | None, ...]:
    h, branch, gate, *of_norm = saved_tensors(ctx)
    wanted = list(ctx.needs_input_grad[2:7])
    if grad_y is None:  # nothing comes through the norm
        h, of_norm, wanted = None, [None] * 5, [wanted[0], *[False] * 4]
    dx = dbranch = None
    rows: Sequence[Tensor | None] = [None] * 5
    if grad_y is not None or (grad_h is not None and gate is not None):
        settings = ctx.lengths, ctx.row_dtype, wanted, ctx.backend
        dx, dbranch, *rows = backward_op(grad_h, grad_y, h, branch, gate, *of_norm, *settings)
    if grad_y is None:
        dx = grad_h
    if ctx.branch_dtype is not None and gate is None and dx is not None:
        dbranch = dx.to(ctx.branch_dtype)
    return dx, dbranch, *rows, *[None] * 5


backward_op = define_op(
    f"{OP}_backward(Tensor? grad_h, Tensor? grad_y, Tensor? h, Tensor? branch, Tensor? gate, Tensor? scale, "
    "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? rstd, SymInt[] lengths, ScalarType? row_dtype, bool[] wanted, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    check=_check_backward,
)
adaln_op = define_op(
    f"{OP}(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "SymInt[] lengths, str? norm, float eps, ScalarType y_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    check=_check,
    backward=_autograd,
    setup_context=_setup,
    composite=torch_impl.composite,
)
