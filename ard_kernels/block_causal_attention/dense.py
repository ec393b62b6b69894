"""Attention without a mask: the calls that `torch_impl.py` composes one under a mask of, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ard_kernels.common.autocast import without_autocast
from ard_kernels.common.dtypes import accumulation_dtype
from ard_kernels.common.library import private

# With fewer keys than a vector has lanes, PyTorch's kernel makes 0 of a NaN (torch 2.13), but not so under a mask.
FEWEST_KEYS = 16
# What the two numbers that make a gradient of lse count: fp16 ends at 65504, and a GradScaler begins with 65536.
LSE_UNITS = 2.0**10, 2.0**-10
LSE_COLUMNS = 8  # by which heads are wider for them

Gradients = tuple[Tensor, Tensor, Tensor]
# dq, dk, dv of (grad_out, q, k, v, out, lse, scale)
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Gradients]

# What scaled_dot_product_attention calls on the CPU; called directly for its log-sum-exp and its backward. None in a
# version of torch that has them under other names: matmuls serve there too.
_FLASH_FORWARD = private("ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
_FLASH_BACKWARD = private("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")


class Dense(Protocol):
    """Attention of q (B, H, T_q, D) over all of k and v (B, H_kv, T_k, D), none of them empty.

    grouped: whether H may be a multiple of H_kv, query head h reading key head h // (H / H_kv); else they are equal.
    """

    grouped: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """softmax(scale q k^T) v, memory in any order, and the scores' log-sum-exp (B, H, T_q), fp32 or fp64."""

    def attend_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float,
    ) -> Gradients:  # fmt: skip
        """(dq, dk, dv) restricted to these queries and keys, given the *global* out and lse of the queries."""


def through_values(
    backward: Backward, grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float,
) -> Gradients:  # fmt: skip
    """The gradients that grad_lse adds, by a kernel that takes none.

    ds = p (do v^T + dlse - delta): dlse as two more numbers of do, which add up to it times those of v beside them.
    """
    most = (grad_lse / LSE_UNITS[0]).to(q.dtype)
    rest = (grad_lse - most.to(grad_lse.dtype) * LSE_UNITS[0]) / LSE_UNITS[1]
    wide_grad = _widen(grad_out, torch.stack((most, rest.to(q.dtype)), -1))
    wide_q, wide_k, wide_v, wide_out = (
        _widen(x, by) for x, by in ((q, 0), (k, 0), (v, v.new_tensor(LSE_UNITS)), (out, 0))
    )
    dq, dk, dv = backward(wide_grad, wide_q, wide_k, wide_v, wide_out, lse, scale)
    D = q.shape[-1]
    return dq[..., :D], dk[..., :D], dv[..., :D]


def _widen(x: Tensor, by: Tensor | int) -> Tensor:
    """x (..., D) as (..., D + LSE_COLUMNS) with `by` in the first two new places."""
    wide = torch.nn.functional.pad(x, (0, LSE_COLUMNS))
    wide[..., x.shape[-1] : x.shape[-1] + 2] = by
    return wide


class Matmuls:
    """Scores in memory, on any device: fp32 for halves, whatever autocast says."""

    grouped = False

    @staticmethod
    @without_autocast
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See Dense."""
        acc = accumulation_dtype(q.dtype)
        scores = q.to(acc) @ k.to(acc).transpose(-1, -2) * scale
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ v.to(acc)).to(q.dtype), lse

    @staticmethod
    @without_autocast
    def attend_backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float,
    ) -> Gradients:  # fmt: skip
        """See Dense."""
        acc = accumulation_dtype(q.dtype)
        q_, k_, v_, grad_out_ = q.to(acc), k.to(acc), v.to(acc), grad_out.to(acc)
        p = (q_ @ k_.transpose(-1, -2) * scale - lse[..., None]).exp()
        delta = (grad_out_ * out.to(acc)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., None]
        ds = p * (grad_out_ @ v_.transpose(-1, -2) - delta) * scale
        dq, dk, dv = ds @ k_, ds.transpose(-1, -2) @ q_, p.transpose(-1, -2) @ grad_out_
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


class FusedOnCpu:
    """PyTorch's fused kernel of the CPU."""

    grouped = False

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See Dense."""
        mask = q.new_zeros(q.shape[2], k.shape[2]) if k.shape[2] < FEWEST_KEYS else None
        return _FLASH_FORWARD(q, k, v, attn_mask=mask, scale=scale)

    @staticmethod
    def attend_backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float,
    ) -> Gradients:  # fmt: skip
        """See Dense."""
        if grad_lse is None:
            return _fused_backward(grad_out, q, k, v, out, lse, scale)
        return through_values(_fused_backward, grad_out, grad_lse, q, k, v, out, lse, scale)


def _fused_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    return _FLASH_BACKWARD(grad_out, q, k, v, out, lse, 0.0, False, scale=scale)


def _fused(device: torch.device) -> bool:
    return device.type == "cpu" and _FLASH_FORWARD is not None


def of_pytorch(device: torch.device, head_dim: int) -> Dense:
    """PyTorch's own, for any head dim. The CPU has a fused kernel; elsewhere fp32 matmuls."""
    return FusedOnCpu() if _fused(device) else Matmuls()
