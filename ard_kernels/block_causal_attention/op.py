"""`ard::block_causal_attention` and its backward: schema, dispatch on the resolved backend, gradient, FLOPs.

The packed form takes q, k, v as one (B, T, 3, H, D) tensor and returns one gradient of that shape: of three views of a
projection autograd would make three gradients and then copy them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention import cuda, spec, torch_impl
from ard_kernels.block_causal_attention.backend import Kernels
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.common.library import define_op
from ard_kernels.common.segments import check_lengths

if TYPE_CHECKING:
    from ard_kernels.block_causal_attention import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.block_causal_attention.triton_impl")

OP = "block_causal_attention"

# They write into outputs and gradients allocated here. PyTorch's fused CPU kernel makes its own, and so does the torch
# backend: a copy would cost up to 9 % of a forward and 2 to 14 % of a backward (T 16 to 1024, fp32, 1 thread).
KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl}


def _refuses_cpu(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str:
    return "attention on the CPU is the torch backend: PyTorch's fused kernel runs near the matmul rate"


register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "torch", serves_everything)
register_backend(OP, "triton", triton_support.refuses)
register_backend(OP, "cpu", _refuses_cpu)


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str
) -> None:
    spec.check_qkv(OP, q, k, v, "bhtd")
    spec.check_rows_apart(OP, {"q": q, "k": k, "v": v})
    _check_settings(q, lengths, window, sink, backend)


def _check_settings(q: Tensor, lengths: Sequence[int], window: int | None, sink: int, backend: str) -> None:
    check_lengths(OP, lengths, q.shape[2])
    spec.check_window(OP, window, sink)
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _check_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> None:
    _check(q, k, v, *settings)
    spec.check_like_q(OP, q, {"grad_out": grad_out, "out": out})
    spec.check_rows_apart(OP, {"out": out})
    spec.check_lse(OP, lse, q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    B, H, T, _D = q.shape
    return spec.empty_output(q), q.new_empty(B, H, T, dtype=accumulation_dtype(q.dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    if backend == "torch" and q.numel():
        return torch_impl.forward(q, k, v, lengths, window, sink, scale)
    out, lse = _outputs(q)
    if q.numel():
        KERNELS[backend].forward(q, k, v, out, lse, lengths, window, sink, scale)
    return out, lse


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> torch_impl.Gradients:
    """Memory for dq, dk, dv."""
    return spec.empty_output(q), spec.empty_output(k), spec.empty_output(v)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _readable(grad_out: Tensor) -> Tensor:
    """A copy of an expanded gradient, as sum().backward() makes."""
    return grad_out if spec.rows_apart(grad_out, 2) else grad_out.contiguous()


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str,
) -> torch_impl.Gradients:  # fmt: skip
    """dq, dk, dv."""
    if backend == "torch" and q.numel():
        return torch_impl.backward(_readable(grad_out), q, k, v, out, lse, lengths, window, sink, scale)
    grads = _gradients(q, k, v)
    if q.numel():
        run = KERNELS[backend].backward
        run(_readable(grad_out), q, k, v, out, lse, *grads, lengths, window, sink, scale)
    return grads


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> torch_impl.Gradients:
    return _gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    grads = (None, None, None) if grad_out is None else backward_op(grad_out, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


def _composite(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return torch_impl.composite(q, k, v, lengths, window, sink, scale) if q.shape[2] else _outputs(q)


def _flops(q: Tensor, lengths: Sequence[int], window: int | None, sink: int, matmuls: int) -> int:
    """Each matmul costs 2 FLOPs per pair and head-dim element; a pair the mask drops costs nothing."""
    B, H, T, D = q.shape
    return matmuls * 2 * B * H * D * spec.useful_pairs(lengths, T, window, sink)


def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, sink: int, *_: Any
) -> int:
    return _flops(q, lengths, window, sink, matmuls=2)  # Q K^T, P V


def _backward_flops(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Sequence[int], window: int | None, sink: int, *_: Any,
) -> int:  # fmt: skip
    return _flops(q, lengths, window, sink, matmuls=5)  # Q K^T again, dO V^T, P^T dO, dS K, dS^T Q


def _split(qkv: Tensor) -> torch_impl.Gradients:
    """q, k, v (B, H, T, D) views of qkv (B, T, 3, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _check_packed(
    qkv: Tensor, lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str
) -> None:
    spec.check_packed(OP, qkv)
    spec.check_rows_apart(OP, {"qkv": qkv}, 1)
    _check_settings(_split(qkv)[0], lengths, window, sink, backend)


def _check_packed_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> None:
    _check_packed(qkv, *settings)
    _check_backward(grad_out, *_split(qkv), out, lse, *settings)


def _packed(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return forward(*_split(qkv), *settings)


def _packed_fake(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _outputs(_split(qkv)[0])


def _packed_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    lengths: Sequence[int], window: int | None, sink: int, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    saved, grads = (_readable(grad_out), *_split(qkv), out, lse), _split(grad)
    if backend == "torch" and qkv.numel():
        torch_impl.backward(*saved, lengths, window, sink, scale, grads)
    elif qkv.numel():
        KERNELS[backend].backward(*saved, *grads, lengths, window, sink, scale)
    return grad


def _packed_backward_fake(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _packed_autograd(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Tensor | None, ...]:
    grad = None if grad_out is None else packed_backward_op(grad_out, *ctx.saved_tensors, *ctx.settings)
    return grad, *(None for _ in ctx.settings)


def _packed_composite(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _composite(*_split(qkv), *settings)


def _packed_forward_flops(qkv: Tensor, *settings: Any) -> int:
    return _forward_flops(*_split(qkv), *settings)


def _packed_backward_flops(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any) -> int:
    return _backward_flops(grad_out, *_split(qkv), out, lse, *settings)


backward_op = define_op(
    "block_causal_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "SymInt[] lengths, int? window, int sink, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    check=_check_backward,
    flops=_backward_flops,
)
forward_op = define_op(
    "block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt[] lengths, int? window, int sink, float scale, "
    "str backend) -> (Tensor, Tensor)",
    forward,
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
