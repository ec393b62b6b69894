"""`ard::segment_attention` and its backward: schema, dispatch on the resolved backend, gradient, FLOPs.

The packed form takes q, k, v as one (B, T, 3, H, D) tensor and returns one gradient of that shape: of three views of a
projection autograd would make three gradients and then copy them together.

`mask` is SegmentMask.code or causal_code, see mask.py; `settings` below are (mask, q_lengths, k_lengths, scale,
backend), of the packed form (mask, lengths, scale, backend).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention import cpu, cuda, dense, flash, spec, torch_impl
from ard_kernels.block_causal_attention.backend import Kernels
from ard_kernels.block_causal_attention.dense import Dense, Gradients
from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.common.library import define_op, saved_tensors
from ard_kernels.common.segments import check_lengths

if TYPE_CHECKING:
    from ard_kernels.block_causal_attention import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.block_causal_attention.triton_impl")

OP = "segment_attention"
NAMES = (OP, "block_causal_attention")  # what users call, of which the second is the first with one kind of mask

# They write into outputs and gradients allocated here.
KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl, "cpu": cpu}
# What computes the calls of torch_impl.py on a device, for a head dim. They make their own outputs, as PyTorch's fused
# CPU kernel does: a copy would cost up to 9 % of a forward and 2 to 14 % of a backward (T 16 to 1024, fp32, 1 thread).
COMPOSED: dict[str, Callable[[torch.device, int], Dense]] = {"torch": dense.of_pytorch, "flash": flash.dense}


for _name in NAMES:
    register_backend(_name, "cuda", cuda.refuses)
    register_backend(_name, "torch", serves_everything)
    register_backend(_name, "triton", triton_support.refuses)
    register_backend(_name, "cpu", cpu.refuses)
    register_backend(_name, "flash", flash.refuses)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float,
    backend: str,
) -> None:  # fmt: skip
    spec.check_qkv(OP, q, k, v, "bhtd", own_tokens=True)
    spec.check_rows_apart(OP, {"q": q, "k": k, "v": v})
    check_lengths(OP, q_lengths, q.shape[2])
    check_lengths(OP, k_lengths, k.shape[2])
    spec.check_code(OP, mask, q_lengths, k_lengths, (q.shape[2], k.shape[2]))
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _check_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> None:
    _check(q, k, v, *settings)
    spec.check_like(OP, "q", q, {"grad_out": grad_out, "out": out})
    spec.check_rows_apart(OP, {"out": out})
    spec.check_lse(OP, lse, q)
    if grad_lse is not None:
        spec.check_like_lse(OP, "grad_lse", grad_lse, q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    B, H, T, _D = q.shape
    return spec.empty_output(q), q.new_empty(B, H, T, dtype=accumulation_dtype(q.dtype))


def _unseeing(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Results where there are no keys at all."""
    return out.zero_(), lse.fill_(float("-inf"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse."""
    segments, some = Segments(mask, tuple(q_lengths), tuple(k_lengths)), q.numel() and k.numel()
    if backend in COMPOSED and some:
        return torch_impl.forward(q, k, v, segments, scale, COMPOSED[backend](q.device, q.shape[-1]))
    out, lse = _outputs(q)
    if not some:
        return _unseeing(out, lse)
    KERNELS[backend].forward(q, k, v, out, lse, segments, scale)
    return out, lse


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Memory for dq, dk, dv."""
    return spec.empty_output(q), spec.empty_output(k), spec.empty_output(v)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _readable(grad_out: Tensor) -> Tensor:
    """A copy of an expanded gradient, as sum().backward() makes."""
    return grad_out if spec.rows_apart(grad_out, 2) else grad_out.contiguous()


def _run_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: Gradients | None, segments: Segments, scale: float, backend: str,
) -> Gradients:  # fmt: skip
    """dq, dk, dv, in the memory of `grads` where given."""
    some = q.numel() and k.numel()
    grad_out, grad_lse = _readable(grad_out), None if grad_lse is None else grad_lse.contiguous()
    if backend in COMPOSED and some:
        calls = COMPOSED[backend](q.device, q.shape[-1])
        return torch_impl.backward(grad_out, grad_lse, q, k, v, out, lse, segments, scale, calls, grads)
    grads = grads or _gradients(q, k, v)
    if some:
        KERNELS[backend].backward(grad_out, grad_lse, q, k, v, out, lse, *grads, segments, scale)
    else:
        for grad in grads:
            grad.zero_()
    return grads


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float, backend: str,
) -> Gradients:  # fmt: skip
    """dq, dk, dv."""
    segments = Segments(mask, tuple(q_lengths), tuple(k_lengths))
    return _run_backward(grad_out, grad_lse, q, k, v, out, lse, None, segments, scale, backend)


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return _gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = saved_tensors(ctx)
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is not None or grad_lse is not None:
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = backward_op(grad_out, grad_lse, q, k, v, out, lse, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


def _composite(
    q: Tensor, k: Tensor, v: Tensor, mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not (q.numel() and k.numel()):
        return _unseeing(*_outputs(q))
    return torch_impl.composite(q, k, v, Segments(mask, tuple(q_lengths), tuple(k_lengths)), scale)


def _flops(q: Tensor, k: Tensor, mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], matmuls: int) -> int:
    """Each matmul costs 2 FLOPs per pair and head-dim element; a pair the mask drops costs nothing."""
    B, H, T, D = q.shape
    segments = Segments(mask, tuple(q_lengths), tuple(k_lengths))
    return matmuls * 2 * B * H * D * spec.visibility(segments, T, k.shape[2]).pairs


def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], *_: Any
) -> int:
    return _flops(q, k, mask, q_lengths, k_lengths, matmuls=2)  # Q K^T, P V


def _backward_flops(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: str, q_lengths: Sequence[int], k_lengths: Sequence[int], *_: Any,
) -> int:  # fmt: skip
    return _flops(q, k, mask, q_lengths, k_lengths, matmuls=5)  # Q K^T again, dO V^T, P^T dO, dS K, dS^T Q


def _split(qkv: Tensor) -> Gradients:
    """q, k, v (B, H, T, D) views of qkv (B, T, 3, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _unpacked(mask: str, lengths: Sequence[int], scale: float, backend: str) -> tuple:
    """The settings of the packed form as those of the other."""
    return mask, lengths, lengths, scale, backend


def _check_packed(qkv: Tensor, *settings: Any) -> None:
    spec.check_packed(OP, qkv)
    spec.check_rows_apart(OP, {"qkv": qkv}, 1)
    _check(*_split(qkv), *_unpacked(*settings))


def _check_packed_backward(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> None:
    _check_packed(qkv, *settings)
    _check_backward(grad_out, grad_lse, *_split(qkv), out, lse, *_unpacked(*settings))


def _packed(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return forward(*_split(qkv), *_unpacked(*settings))


def _packed_fake(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _outputs(_split(qkv)[0])


def _packed_backward(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor,
    mask: str, lengths: Sequence[int], scale: float, backend: str,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    segments = Segments(mask, tuple(lengths), tuple(lengths))
    _run_backward(grad_out, grad_lse, *_split(qkv), out, lse, _split(grad), segments, scale, backend)
    return grad


def _packed_backward_fake(grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _packed_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse = saved_tensors(ctx)
    grad = None
    if grad_out is not None or grad_lse is not None:
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad = packed_backward_op(grad_out, grad_lse, qkv, out, lse, *ctx.settings)
    return grad, *(None for _ in ctx.settings)


def _packed_composite(qkv: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _composite(*_split(qkv), *_unpacked(*settings))


def _packed_forward_flops(qkv: Tensor, *settings: Any) -> int:
    return _forward_flops(*_split(qkv), *_unpacked(*settings))


def _packed_backward_flops(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> int:
    return _backward_flops(grad_out, grad_lse, *_split(qkv), out, lse, *_unpacked(*settings))


backward_op = define_op(
    "segment_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, str mask, SymInt[] q_lengths, SymInt[] k_lengths, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    check=_check_backward,
    flops=_backward_flops,
)
forward_op = define_op(
    "segment_attention(Tensor q, Tensor k, Tensor v, str mask, SymInt[] q_lengths, SymInt[] k_lengths, float scale, "
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
    "segment_attention_packed_backward(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, "
    "str mask, SymInt[] lengths, float scale, str backend) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
    check=_check_packed_backward,
    flops=_packed_backward_flops,
)
packed_op = define_op(
    "segment_attention_packed(Tensor qkv, str mask, SymInt[] lengths, float scale, str backend) -> (Tensor, Tensor)",
    _packed,
    _packed_fake,
    check=_check_packed,
    backward=_packed_autograd,
    setup_context=_packed_setup_context,
    composite=_packed_composite,
    flops=_packed_forward_flops,
)
