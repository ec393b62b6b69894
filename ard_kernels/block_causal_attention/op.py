"""`ard::block_causal_attention` and its backward: schema, dispatch on the resolved backend, gradient, FLOPs.

The packed form takes q, k, v as one (B, T, 3, H, D) tensor and returns one gradient of that shape: of three views of a
projection autograd would make three gradients and then copy them together.
"""

from __future__ import annotations

import torch

from ard_kernels import triton_support
from ard_kernels.backends import register_backend
from ard_kernels.block_causal_attention import cuda, torch_impl
from ard_kernels.block_causal_attention.spec import useful_pairs
from ard_kernels.library import define_op

IMPLEMENTATIONS = {
    "cuda": cuda,
    "triton": triton_support.LazyModule("ard_kernels.block_causal_attention.triton_impl"),
    "torch": torch_impl,
}

register_backend("block_causal_attention", "cuda", cuda.refuses)
register_backend("block_causal_attention", "torch", torch_impl.refuses)
register_backend("block_causal_attention", "triton", triton_support.refuses)
register_backend(
    "block_causal_attention",
    "cpu",
    lambda device, dtype, width=None: (
        "attention on the CPU is the torch backend: PyTorch's fused kernel runs near the matmul rate"
    ),
)


def _forward(q, k, v, lengths, window, sink, scale, backend):
    return IMPLEMENTATIONS[backend].forward(q, k, v, lengths, window, sink, scale)


def _forward_fake(q, k, v, lengths, window, sink, scale, backend):
    B, H, T, _ = q.shape
    return torch_impl.out_like(q), q.new_empty(B, H, T, dtype=torch_impl.lse_dtype(q.dtype))


def _backward(grad_out, q, k, v, out, lse, lengths, window, sink, scale, backend):
    if grad_out.stride(-1) != 1:  # an expanded gradient, as sum().backward() makes
        grad_out = grad_out.contiguous()
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


def _flops(q_shape, lengths, window, sink, matmuls: int) -> int:
    """Each matmul costs 2 FLOPs per pair and head-dim element; a pair the mask drops costs nothing."""
    B, H, T, D = q_shape
    return matmuls * 2 * B * H * D * useful_pairs(lengths, T, window, sink)


def _forward_flops(q, k, v, lengths, window, sink, *args, **kwargs) -> int:
    return _flops(q, lengths, window, sink, matmuls=2)  # Q K^T, P V


def _backward_flops(grad_out, q, k, v, out, lse, lengths, window, sink, *args, **kwargs) -> int:
    return _flops(q, lengths, window, sink, matmuls=5)  # Q K^T again, dO V^T, P^T dO, dS K, dS^T Q


def _split(qkv):
    """q, k, v (B, H, T, D) views of qkv (B, T, 3, H, D)."""
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def _packed(qkv, *settings):
    return _forward(*_split(qkv), *settings)


def _packed_fake(qkv, *settings):
    return _forward_fake(*_split(qkv), *settings)


def _packed_backward(grad_out, qkv, out, lse, *settings):
    *settings, backend = settings
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
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


def _packed_flops(matmuls, qkv, lengths, window, sink) -> int:
    B, T, _, H, D = qkv
    return _flops((B, H, T, D), lengths, window, sink, matmuls)


def _packed_forward_flops(qkv, lengths, window, sink, *args, **kwargs) -> int:
    return _packed_flops(2, qkv, lengths, window, sink)


def _packed_backward_flops(grad_out, qkv, out, lse, lengths, window, sink, *args, **kwargs) -> int:
    return _packed_flops(5, qkv, lengths, window, sink)


backward_op = define_op(
    "block_causal_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "SymInt[] lengths, int? window, int sink, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)
forward_op = define_op(
    "block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt[] lengths, int? window, int sink, float scale, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
    flops=_forward_flops,
)
packed_backward_op = define_op(
    "block_causal_attention_packed_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, SymInt[] lengths, "
    "int? window, int sink, float scale, str backend) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
    flops=_packed_backward_flops,
)
packed_op = define_op(
    "block_causal_attention_packed(Tensor qkv, SymInt[] lengths, int? window, int sink, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _packed,
    _packed_fake,
    backward=_packed_autograd,
    setup_context=_packed_setup_context,
    flops=_packed_forward_flops,
)
