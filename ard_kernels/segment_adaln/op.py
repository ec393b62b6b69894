"""The ops of the adaLN family: schemas, dispatch on the resolved backend, fakes, gradients.

A backend gives two functions, `forward` and `backward`, that serve all three ops; the inputs an op lacks are None.
"""

from __future__ import annotations

import torch

from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend
from ard_kernels.common.library import define_op
from ard_kernels.segment_adaln import cpu, cuda, spec, torch_impl

IMPLEMENTATIONS = {
    "cuda": cuda,
    "triton": triton_support.LazyModule("ard_kernels.segment_adaln.triton_impl"),
    "cpu": cpu,
    "torch": torch_impl,
}

for _op in ("adaln_modulate", "gate_residual_adaln", "gate_residual"):
    register_backend(_op, "cuda", cuda.refuses)
    register_backend(_op, "triton", triton_support.refuses)
    register_backend(_op, "cpu", cpu.refuses)
    register_backend(_op, "torch", torch_impl.refuses)


def _dense(grad):
    return grad if grad is None or grad.stride(-1) == 1 else grad.contiguous()


def _check(op, tokens, rows, lengths, backend, y_dtype=None):
    """What `torch.ops.ard` is called with; a public function has checked its own."""
    spec.check_raw(op, tokens, rows, lengths)
    first = next(x for x in tokens.values() if x is not None)
    if y_dtype is not None and (y_dtype not in spec.DTYPES or y_dtype == torch.float64 != first.dtype):
        raise ValueError(f"{op}: y_dtype is {y_dtype}; expected float32, bfloat16, float16, or float64 as x")
    check_backend(op, backend, first.device, first.dtype, first.shape[-1])


# adaln_modulate


def _check_modulate(x, shift, scale, lengths, eps, y_dtype, backend):
    _check("adaln_modulate", {"x": x}, {"shift": shift, "scale": scale}, lengths, backend, y_dtype)


def _check_modulate_backward(grad_y, x, scale, mean, rstd, lengths, backend):
    _check("adaln_modulate", {"x": x, "grad_y": _dense(grad_y)}, {"scale": scale}, lengths, backend)
    spec.check_statistics("adaln_modulate", x, mean=mean, rstd=rstd)


def _modulate_composite(x, shift, scale, lengths, eps, y_dtype, backend):
    return torch_impl.composite(x, None, None, shift, scale, lengths, eps, y_dtype)[1:]


def _modulate(x, shift, scale, lengths, eps, y_dtype, backend):
    return IMPLEMENTATIONS[backend].forward(x, None, None, shift, scale, lengths, eps, y_dtype)[1:]


def _modulate_fake(x, shift, scale, lengths, eps, y_dtype, backend):
    return torch_impl.outputs(x, None, shift, y_dtype)[1:]


def _modulate_backward(grad_y, x, scale, mean, rstd, lengths, backend):
    run = IMPLEMENTATIONS[backend].backward
    dx, _, _, dshift, dscale = run(None, _dense(grad_y), x, None, None, scale, mean, rstd, lengths)
    return dx, dshift, dscale


def _modulate_backward_fake(grad_y, x, scale, mean, rstd, lengths, backend):
    dx, _, _, dshift, dscale = torch_impl.gradients(x, None, None, scale)
    return dx, dshift, dscale


def _modulate_setup(ctx, inputs, output):
    x, _, scale, ctx.lengths, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _modulate_autograd(ctx, grad_y, _grad_mean, _grad_rstd):
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


def _check_gated(x, branch, gate, shift, scale, lengths, eps, y_dtype, backend):
    rows = {"gate": gate, "shift": shift, "scale": scale}
    _check("gate_residual_adaln", {"x": x, "branch": branch}, rows, lengths, backend, y_dtype)


def _check_gated_backward(grad_h, grad_y, h, branch, gate, scale, mean, rstd, lengths, backend):
    tokens = {"h": h, "branch": branch, "grad_h": _dense(grad_h), "grad_y": _dense(grad_y)}
    _check("gate_residual_adaln", tokens, {"gate": gate, "scale": scale}, lengths, backend)
    spec.check_statistics("gate_residual_adaln", h, mean=mean, rstd=rstd)


def _gated_composite(x, branch, gate, shift, scale, lengths, eps, y_dtype, backend):
    return torch_impl.composite(x, branch, gate, shift, scale, lengths, eps, y_dtype)


def _gated(x, branch, gate, shift, scale, lengths, eps, y_dtype, backend):
    return IMPLEMENTATIONS[backend].forward(x, branch, gate, shift, scale, lengths, eps, y_dtype)


def _gated_fake(x, branch, gate, shift, scale, lengths, eps, y_dtype, backend):
    return torch_impl.outputs(x, branch, shift, y_dtype)


def _gated_backward(grad_h, grad_y, h, branch, gate, scale, mean, rstd, lengths, backend):
    run = IMPLEMENTATIONS[backend].backward
    return run(_dense(grad_h), _dense(grad_y), h, branch, gate, scale, mean, rstd, lengths)


def _gated_backward_fake(grad_h, grad_y, h, branch, gate, scale, mean, rstd, lengths, backend):
    return torch_impl.gradients(h, branch, gate, scale)


def _gated_setup(ctx, inputs, output):
    _, branch, gate, _, scale, ctx.lengths, _, _, ctx.backend = inputs
    h, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, branch, gate, scale, mean, rstd)


def _gated_autograd(ctx, grad_h, grad_y, _grad_mean, _grad_rstd):
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
    _gated_backward,
    _gated_backward_fake,
    check=_check_gated_backward,
)
gated_op = define_op(
    "gate_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, SymInt[] lengths, "
    "float eps, ScalarType y_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated,
    _gated_fake,
    check=_check_gated,
    backward=_gated_autograd,
    setup_context=_gated_setup,
    composite=_gated_composite,
)

# gate_residual


def _check_gate(x, branch, gate, lengths, backend):
    _check("gate_residual", {"x": x, "branch": branch}, {"gate": gate}, lengths, backend)


def _check_gate_backward(grad_h, branch, gate, lengths, backend):
    _check("gate_residual", {"branch": branch, "grad_h": _dense(grad_h)}, {"gate": gate}, lengths, backend)


def _gate_composite(x, branch, gate, lengths, backend):
    return torch_impl.composite(x, branch, gate, None, None, lengths, 1.0, None)[0]


def _gate(x, branch, gate, lengths, backend):
    return IMPLEMENTATIONS[backend].forward(x, branch, gate, None, None, lengths, 1.0, None)[0]


def _gate_fake(x, branch, gate, lengths, backend):
    return torch_impl.outputs(x, branch, None, None)[0]


def _gate_backward(grad_h, branch, gate, lengths, backend):
    run = IMPLEMENTATIONS[backend].backward
    return run(_dense(grad_h), None, None, branch, gate, None, None, None, lengths)[1:3]


def _gate_backward_fake(grad_h, branch, gate, lengths, backend):
    return torch_impl.gradients(None, branch, gate, None)[1:3]


def _gate_setup(ctx, inputs, output):
    _, branch, gate, ctx.lengths, ctx.backend = inputs
    ctx.save_for_backward(branch, gate)


def _gate_autograd(ctx, grad_h):
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
