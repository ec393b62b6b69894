# mypy: no-strict-optional
# (Inputs that an op lacks are None, in groups that their types do not know.)
"""The ops of the adaLN family: schemas, dispatch on the resolved backend, fakes, gradients.

`forward` and `backward` serve all three ops, as those of a backend do; the inputs an op lacks are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.dtypes import DTYPES, accumulation_dtype
from ard_kernels.common.library import define_op
from ard_kernels.segment_adaln import cpu, cuda, spec, torch_impl
from ard_kernels.segment_adaln.backend import Kernels
from ard_kernels.segment_adaln.torch_impl import Gradients, Outputs

if TYPE_CHECKING:
    from ard_kernels.segment_adaln import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.segment_adaln.triton_impl")

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


def _outputs(x: Tensor, branch: Tensor | None, shift: Tensor | None, y_dtype: torch.dtype | None) -> Outputs:
    """Memory for h, y, mean, rstd."""
    h = _empty_like(branch, x.dtype)
    if shift is None:
        return h, None, None, None
    mean = x.new_empty(*x.shape[:2], dtype=accumulation_dtype(x.dtype))
    return h, _empty_like(x, y_dtype), mean, torch.empty_like(mean)


def _gradients(h: Tensor | None, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None) -> Gradients:
    """Memory for dx, dbranch, dgate, dshift, dscale."""
    return _empty_like(h), _empty_like(branch), _empty_like(gate), _empty_like(scale), _empty_like(scale)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int], eps: float, y_dtype: torch.dtype | None, backend: str,
) -> Outputs:  # fmt: skip
    """h, y, mean, rstd; None without the inputs that they need."""
    if backend == "torch":
        return torch_impl.forward(x, branch, gate, shift, scale, lengths, eps, y_dtype)
    made = _outputs(x, branch, shift, y_dtype)
    if x.numel():
        KERNELS[backend].forward(x, branch, gate, shift, scale, *made, lengths, eps)
    return made


def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor | None, lengths: Sequence[int], backend: str,
) -> Gradients:  # fmt: skip
    """dx, dbranch, dgate, dshift, dscale; None without the inputs that they are for."""
    grad_h, grad_y = _dense(grad_h), _dense(grad_y)
    saved = h, branch, gate, scale
    if backend == "torch":
        return torch_impl.backward(grad_h, grad_y, *saved, mean, rstd, lengths)
    made = _gradients(*saved)
    if (h if h is not None else grad_h).numel():
        KERNELS[backend].backward(grad_h, grad_y, *saved, mean, rstd, *made, lengths)
        return made
    for grad in made:  # sums over no tokens
        if grad is not None:
            grad.zero_()
    return made


def _dense(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()


def _check(
    op: str, tokens: dict[str, Tensor | None], rows: dict[str, Tensor | None], lengths: Sequence[int], backend: str,
    y_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """What `torch.ops.ard` is called with; a public function has checked its own."""
    spec.check_raw(op, tokens, rows, lengths)
    first = next(x for x in tokens.values() if x is not None)
    if y_dtype is not None and (y_dtype not in DTYPES or y_dtype == torch.float64 != first.dtype):
        raise ValueError(f"{op}: y_dtype is {y_dtype}; expected float32, bfloat16, float16, or float64 as x")
    check_backend(op, backend, first.device, first.dtype, first.shape[-1])


# adaln_modulate


def _check_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float, y_dtype: torch.dtype, backend: str
) -> None:
    _check("adaln_modulate", {"x": x}, {"shift": shift, "scale": scale}, lengths, backend, y_dtype)


def _check_modulate_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, lengths: Sequence[int], backend: str
) -> None:
    _check("adaln_modulate", {"x": x, "grad_y": _dense(grad_y)}, {"scale": scale}, lengths, backend)
    spec.check_statistics("adaln_modulate", x, mean=mean, rstd=rstd)


def _modulate_composite(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float, y_dtype: torch.dtype, backend: str
) -> tuple[Tensor | None, ...]:
    return torch_impl.composite(x, None, None, shift, scale, lengths, eps, y_dtype)[1:]


def _modulate(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float, y_dtype: torch.dtype, backend: str
) -> tuple[Tensor | None, ...]:
    return forward(x, None, None, shift, scale, lengths, eps, y_dtype, backend)[1:]


def _modulate_fake(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float, y_dtype: torch.dtype, backend: str
) -> tuple[Tensor | None, ...]:
    return _outputs(x, None, shift, y_dtype)[1:]


def _modulate_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor | None, ...]:
    dx, _, _, dshift, dscale = backward(None, grad_y, x, None, None, scale, mean, rstd, lengths, backend)
    return dx, dshift, dscale


def _modulate_backward_fake(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor | None, ...]:
    dx, _, _, dshift, dscale = _gradients(x, None, None, scale)
    return dx, dshift, dscale


def _modulate_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, _, scale, ctx.lengths, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _modulate_autograd(
    ctx: Any, grad_y: Tensor | None, _grad_mean: None, _grad_rstd: None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    return *modulate_backward_op(grad_y, *ctx.saved_tensors, ctx.lengths, ctx.backend), None, None, None, None


modulate_backward_op = define_op(
    "adaln_modulate_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor mean, Tensor rstd, SymInt[] lengths, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _modulate_backward,
    _modulate_backward_fake,
    check=_check_modulate_backward,
)
modulate_op = define_op(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, SymInt[] lengths, float eps, ScalarType y_dtype, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _modulate,
    _modulate_fake,
    check=_check_modulate,
    backward=_modulate_autograd,
    setup_context=_modulate_setup,
    composite=_modulate_composite,
)

# gate_residual_adaln


def _check_gated(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    lengths: Sequence[int],
    eps: float,
    y_dtype: torch.dtype,
    backend: str,
) -> None:
    rows = {"gate": gate, "shift": shift, "scale": scale}
    _check("gate_residual_adaln", {"x": x, "branch": branch}, rows, lengths, backend, y_dtype)


def _check_gated_backward(
    grad_h: Tensor | None,
    grad_y: Tensor,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Sequence[int],
    backend: str,
) -> None:
    tokens = {"h": h, "branch": branch, "grad_h": _dense(grad_h), "grad_y": _dense(grad_y)}
    _check("gate_residual_adaln", tokens, {"gate": gate, "scale": scale}, lengths, backend)
    spec.check_statistics("gate_residual_adaln", h, mean=mean, rstd=rstd)


def _gated_composite(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    lengths: Sequence[int],
    eps: float,
    y_dtype: torch.dtype,
    backend: str,
) -> Outputs:
    return torch_impl.composite(x, branch, gate, shift, scale, lengths, eps, y_dtype)


def _gated_fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    lengths: Sequence[int],
    eps: float,
    y_dtype: torch.dtype,
    backend: str,
) -> Outputs:
    return _outputs(x, branch, shift, y_dtype)


def _gated_backward_fake(
    grad_h: Tensor | None,
    grad_y: Tensor,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Sequence[int],
    backend: str,
) -> Gradients:
    return _gradients(h, branch, gate, scale)


def _gated_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, branch, gate, _, scale, ctx.lengths, _, _, ctx.backend = inputs
    h, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, branch, gate, scale, mean, rstd)


def _gated_autograd(
    ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None, _grad_mean: None, _grad_rstd: None
) -> tuple[Tensor | None, ...]:
    h, branch, gate, scale, mean, rstd = ctx.saved_tensors
    rest = (None,) * 4
    if grad_y is not None:
        grads = gated_backward_op(grad_h, grad_y, h, branch, gate, scale, mean, rstd, ctx.lengths, ctx.backend)
        return *grads, *rest
    if grad_h is not None:
        return grad_h, *gate_backward_op(grad_h, branch, gate, ctx.lengths, ctx.backend), None, None, *rest
    return (None,) * 9


gated_backward_op = define_op(
    "gate_residual_adaln_backward(Tensor? grad_h, Tensor grad_y, Tensor h, Tensor branch, Tensor gate, Tensor scale, "
    "Tensor mean, Tensor rstd, SymInt[] lengths, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _gated_backward_fake,
    check=_check_gated_backward,
)
gated_op = define_op(
    "gate_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, SymInt[] lengths, "
    "float eps, ScalarType y_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    _gated_fake,
    check=_check_gated,
    backward=_gated_autograd,
    setup_context=_gated_setup,
    composite=_gated_composite,
)

# gate_residual


def _check_gate(x: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str) -> None:
    _check("gate_residual", {"x": x, "branch": branch}, {"gate": gate}, lengths, backend)


def _check_gate_backward(grad_h: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str) -> None:
    _check("gate_residual", {"branch": branch, "grad_h": _dense(grad_h)}, {"gate": gate}, lengths, backend)


def _gate_composite(x: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str) -> Tensor | None:
    return torch_impl.composite(x, branch, gate, None, None, lengths, 1.0, None)[0]


def _gate(x: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str) -> Tensor | None:
    return forward(x, branch, gate, None, None, lengths, 1.0, None, backend)[0]


def _gate_fake(x: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str) -> Tensor | None:
    return _outputs(x, branch, None, None)[0]


def _gate_backward(
    grad_h: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor | None, ...]:
    return backward(grad_h, None, None, branch, gate, None, None, None, lengths, backend)[1:3]


def _gate_backward_fake(
    grad_h: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor | None, ...]:
    return _gradients(None, branch, gate, None)[1:3]


def _gate_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, branch, gate, ctx.lengths, ctx.backend = inputs
    ctx.save_for_backward(branch, gate)


def _gate_autograd(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    return grad_h, *gate_backward_op(grad_h, *ctx.saved_tensors, ctx.lengths, ctx.backend), None, None


gate_backward_op = define_op(
    "gate_residual_backward(Tensor grad_h, Tensor branch, Tensor gate, SymInt[] lengths, str backend) "
    "-> (Tensor, Tensor)",
    _gate_backward,
    _gate_backward_fake,
    check=_check_gate_backward,
)
gate_op = define_op(
    "gate_residual(Tensor x, Tensor branch, Tensor gate, SymInt[] lengths, str backend) -> Tensor",
    _gate,
    _gate_fake,
    check=_check_gate,
    backward=_gate_autograd,
    setup_context=_gate_setup,
    composite=_gate_composite,
)
