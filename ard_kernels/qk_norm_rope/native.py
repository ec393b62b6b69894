"""How the C++ backends take a call of qk_norm_rope: plain tuples of pointers, strides and codes (csrc/.../python.h)."""

from __future__ import annotations

from torch import Tensor

from ard_kernels.common import extension
from ard_kernels.qk_norm_rope.spec import NORMS, Rule


def rule_fields(x_BTHD: Tensor, rule: Rule) -> tuple:
    """(B, T, H, D, dtype, norm, over all, half, eps)."""
    norm = 0 if rule.norm == "none" else NORMS.index(rule.norm) + 1
    return *x_BTHD.shape, extension.dtype_code(x_BTHD.dtype), norm, rule.over_all, rule.half, rule.eps


def view(x_BTHD: Tensor) -> tuple[int, ...]:
    """What the extension takes as its HeadsView; what broadcasts has stride 0."""
    B, T, H, _ = (step if size > 1 else 0 for step, size in zip(x_BTHD.stride(), x_BTHD.shape, strict=True))
    return x_BTHD.data_ptr(), B, H, T


def parameter(value: Tensor | None) -> tuple[int, int] | None:
    """(address, dtype)."""
    return None if value is None else (value.data_ptr(), extension.dtype_code(value.dtype))


def table_fields(cos: Tensor | None, sin: Tensor | None) -> tuple | None:
    """(cos, sin, dtype, rows, pairs)."""
    if cos is None or sin is None:
        return None
    return view(cos), view(sin), extension.dtype_code(cos.dtype), cos.shape[1], cos.shape[3]
