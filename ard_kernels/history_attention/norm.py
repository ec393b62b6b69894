"""qk-norm: q and k normalised over the head dim before attention, as SD3, Flux and Lumina do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ard_kernels.common.arguments import NORM_EPS, check_number, check_tensor, described
from ard_kernels.common.dtypes import accumulation_dtype

KINDS = ("rms", "layer")


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A normalisation of q or k over the head dim: y = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias.

    Statistics are fp32 (fp64 for fp64); the result is rounded once, to the dtype of x.

    Args:
        kind: "rms", m = 0, as `torch.nn.functional.rms_norm`; or "layer", m = mean(x), as `layer_norm`.
        weight: (D,) learned factors, None for 1; the dtype of q or fp32.
        bias: (D,) learned offsets, None for 0, with kind "layer" only; the dtype of q or fp32.
        eps: added to the mean square; >= 0.

    Raises:
        ValueError: an unknown kind, a negative eps, a bias with kind "rms". What depends on q and k (shape, dtype,
            device of weight and bias) is checked by the op.
    """

    kind: str = "rms"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = NORM_EPS

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"HeadNorm: kind is {described(self.kind)}; expected 'rms' or 'layer'")
        if not check_number("HeadNorm", "eps", self.eps, "a number >= 0") >= 0:
            raise ValueError(f"HeadNorm: eps is {self.eps!r}; expected a number >= 0")
        if self.kind == "rms" and self.bias is not None:
            raise ValueError("HeadNorm: bias is given with kind 'rms'; expected None (kind 'layer' has one)")


def check_norm(op: str, name: str, norm: HeadNorm | None, x: torch.Tensor) -> None:
    """ValueError unless `norm` is None or a HeadNorm whose parameters fit x (..., D)."""
    if norm is None:
        return
    if not isinstance(norm, HeadNorm):
        raise ValueError(f"{op}: {name} is {described(norm)}; expected None or an ard_kernels.HeadNorm")
    for part, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter is None:
            continue
        where = f"{op}: {name}.{part}"
        check_tensor(op, f"{name}.{part}", parameter)
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{where} has shape {tuple(parameter.shape)}; expected (head_dim,) = {(x.shape[-1],)}")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{where} has dtype {parameter.dtype}; expected q's {x.dtype} or torch.float32")
        if parameter.device != x.device:
            raise ValueError(f"{where} is on {parameter.device}; expected q's {x.device}")


def normalise(x: torch.Tensor, norm: HeadNorm | None) -> torch.Tensor:
    """x (..., D) by `norm`, composed of PyTorch ops."""
    if norm is None:
        return x
    wide = accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (norm.weight, norm.bias))
    if norm.kind == "rms":
        return F.rms_norm(x.to(wide), x.shape[-1:], weight, norm.eps).to(x.dtype)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, norm.eps).to(x.dtype)
