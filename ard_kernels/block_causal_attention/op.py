"""`ard::block_causal_attention` and its backward: schema, dispatch on the resolved backend, gradient, FLOPs.

The packed form takes q, k, v as one (B, T, 3, H, D) tensor and returns one gradient of that shape: of three views of a
projection autograd would make three gradients and then copy them together.
"""

from __future__ import annotations

import torch

from ard_kernels.block_causal_attention import cuda, spec, torch_impl
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend
from ard_kernels.common.library import define_op
from ard_kernels.common.segments import check_lengths

OP = "block_causal_attention"

IMPLEMENTATIONS = {
    "cuda": cuda,
    "triton": triton_support.LazyModule("ard_kernels.block_causal_attention.triton_impl"),
    "torch": torch_impl,
}

register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "torch", torch_impl.refuses)
register_backend(OP, "triton", triton_support.refuses)
register_backend(
    OP,
    "cpu",
    lambda device, dtype, width=None: (
        "attention on the CPU is the torch backend: PyTorch's fused kernel runs near the matmul rate"
    ),
)


def _check(q, k, v, lengths, window, sink, scale, backend):
    spec.check_qkv(OP, q, k, v, "bhtd")
    spec.check_rows_apart(OP, {"q": q, "k": k, "v": v})
    _check_settings(q, lengths, window, sink, backend)


def _check_settings(q, lengths, window, sink, backend):
    check_lengths(OP, lengths, q.shape[2])
    spec.check_window(OP, window, sink)
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _check_backward(grad_out, q, k, v, out, lse, lengths, window, sink, scale, backend):
    _check(q, k, v, lengths, window, sink, scale, backend)
    spec.check_like_q(OP, q, {"grad_out": grad_out, "out": out})
    spec.check_rows_apart(OP, {"out": out})
    spec.check_lse(OP, lse, q)


def _forward(q, k, v, lengths, window, sink, scale, backend):
    return IMPLEMENTATIONS[backend].forward(q, k, v, lengths, window, sink, scale)


def _forward_fake(q, k, v, lengths, window, sink, scale, backend):
    B, H, T, _ = q.shape
    return torch_impl.out_like(q), q.new_empty(B, H, T, dtype=torch_impl.lse_dtype(q.dtype))


def _readable(grad_out):
    """A copy of an expanded gradient, as sum().backward() makes."""
    return grad_out if spec.rows_apart(grad_out, 2) else grad_out.contiguous()


def _backward(grad_out, q, k, v, out, lse, lengths, window, sink, scale, backend):
    grad_out = _readable(grad_out)
    return IMPLEMENTATIONS[backend].backward(grad_out, q, k, v, out, lse, lengths, window, sink, scale)


def _backward_fake(grad_out, q, k, v, out, lse, lengths, window, sink, scale, backend):
    return torch_impl.gradients_like(q, k, v)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx, grad_out, _grad_lse):
    grads = (None, None, None) if grad_out is None else backward_op(grad_out, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


def _composite(q, k, v, lengths, window, sink, scale, backend):
    return torch_impl.composite(q, k, v, lengths, window, sink, scale)


def _flops(q, lengths, window, sink, matmuls: int) -> int:
    """Each matmul costs 2 FLOPs per pair and head-dim element; a pair the mask drops costs nothing."""
    B, H, T, D = q.shape
    return matmuls * 2 * B * H * D * spec.useful_pairs(lengths, T, window, sink)


def _forward_flops(q, k, v, lengths, window, sink, *args) -> int:
    return _flops(q, lengths, window, sink, matmuls=2)  # Q K^T, P V


def _backward_flops(grad_out, q, k, v, out, lse, lengths, window, sink, *args) -> int:
    return _flops(q, lengths, window, sink, matmuls=5)  # Q K^T again, dO V^T, P^T dO, dS K, dS^T Q


def _split(qkv):
    """q, k, v (B, H, T, D) views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _check_packed(qkv, lengths, window, sink, scale, backend):
    spec.check_packed(OP, qkv)
    spec.check_rows_apart(OP, {"qkv": qkv}, 1)
    _check_settings(_split(qkv)[0], lengths, window, sink, backend)


def _check_packed_backward(grad_out, qkv, out, lse, *settings):
    _check_packed(qkv, *settings)
    _check_backward(grad_out, *_split(qkv), out, lse, *settings)


def _packed(qkv, *settings):
    return _forward(*_split(qkv), *settings)


def _packed_fake(qkv, *settings):
    return _forward_fake(*_split(qkv), *settings)


def _packed_backward(grad_out, qkv, out, lse, *settings):
    *settings, backend = settings
    grad_out = _readable(grad_out)
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    IMPLEMENTATIONS[backend].backward(grad_out, *_split(qkv), out, lse, *settings, _split(grad))
    return grad


def _packed_backward_fake(grad_out, qkv, out, lse, *settings):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _packed_setup_context(ctx, inputs, output):
    qkv, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _packed_autograd(ctx, grad_out, _grad_lse):
    grad = None if grad_out is None else packed_backward_op(grad_out, *ctx.saved_tensors, *ctx.settings)
    return grad, *(None for _ in ctx.settings)


def _packed_composite(qkv, *settings):
    return _composite(*_split(qkv), *settings)


def _packed_forward_flops(qkv, *settings) -> int:
    return _forward_flops(*_split(qkv), *settings)


def _packed_backward_flops(grad_out, qkv, out, lse, *settings) -> int:
    return _backward_flops(grad_out, *_split(qkv), out, lse, *settings)


backward_op = define_op(
    "block_causal_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "SymInt[] lengths, int? window, int sink, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    check=_check_backward,
    flops=_backward_flops,
)
forward_op = define_op(
    "block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt[] lengths, int? window, int sink, float scale, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    check=_check,
    backward=_autograd,
    setup_context=_setup_context,
    composite=_composite,
    flops=_forward_flops,
)
packed_backward_op = define_op(
    "block_causal_attention_packed_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, SymInt[] lengths, "
    "int? window, int sink, float scale, str backend) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
    check=_check_packed_backward,
    flops=_packed_backward_flops,
)
packed_op = define_op(
    "block_causal_attention_packed(Tensor qkv, SymInt[] lengths, int? window, int sink, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _packed,
    _packed_fake,
    check=_check_packed,
    backward=_packed_autograd,
    setup_context=_packed_setup_context,
    composite=_packed_composite,
    flops=_packed_forward_flops,
)
