# mypy: no-strict-optional
# (Inputs that a call lacks are None, in groups that their types do not know.)
"""Seams between the sub-blocks of a diffusion transformer: gated residual, norm, modulation by a row per segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.common.autocast import autocast_dtype
from ard_kernels.common.backends import resolve
from ard_kernels.common.self_check import register_trials
from ard_kernels.segment_adaln import spec
from ard_kernels.segment_adaln.op import adaln_op
from ard_kernels.segment_adaln.torch_impl import Outputs
from ard_kernels.segment_adaln.trials import UNITS

for _unit in UNITS:
    register_trials(_unit, _unit.op)

__all__ = ["adaln_modulate", "gate_residual", "gate_residual_adaln"]


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    segment_length: int | Sequence[int],
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> torch.Tensor:
    """y = N(x) * (1 + scale) + shift, N a LayerNorm or RMSNorm over C.

    Args:
        x: (B, T, C) fp32, bf16 or fp16 (fp64 on the torch backend); any strides with a contiguous last dim.
        shift, scale: (B, S, C) one row per segment, also as (B, S, 1, C), or (B, T, C) one per token; None: 0. Of one
            shape and dtype, which may differ from x's (float64 with float64 x only). Strided chunks of one projection
            (B, S, 6C), or (B, S, 6, C), are read in place; gradients have the shape given.
        segment_length: tokens per segment L (T = S * L), or the S lengths of ragged segments.
        norm: "layer", (x - mean) / sqrt(var + eps) * weight + bias; or "rms", x / sqrt(mean(x^2) + eps) * weight.
        weight, bias: (C,), of any dtype that rows may have; None: 1, 0. An RMSNorm has no bias.
        eps: added to the variance, or to the mean of squares.
        backend: None chooses; see `ard_kernels.backends()`.

    Returns:
        y (B, T, C) in x's dtype; under autocast in the autocast dtype, since a matmul reads it next. Statistics and
        arithmetic are fp32.

    Raises:
        ValueError: a shape, dtype, device, segment, norm or backend outside this contract.

    Source: adaLN-Zero of DiT (arXiv 2212.09748, Fig. 3), conditioned per trajectory step in ARD (arXiv 2504.11295);
        rows per frame: Wan (arXiv 2503.20314); RMSNorm: arXiv 1910.07467.
    """
    rows = (None, shift, scale)
    return _call("adaln_modulate", x, None, rows, segment_length, norm, weight, bias, eps, backend)[1]


def gate_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    segment_length: int | Sequence[int],
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + gate * branch and y = N(h) * (1 + scale) + shift in one pass: the seam between two sub-blocks.

    Args:
        x, branch: (B, T, C); branch (the attention's or MLP's output) may have another dtype than x, the residual.
        gate, shift, scale: as the rows of `adaln_modulate`, those given of one shape and dtype; gate None: 1.
        segment_length, norm, weight, bias, eps, backend: as in `adaln_modulate`.

    Returns:
        (h, y): h in x's dtype, y as in `adaln_modulate`. N reads h as stored (rounded to its dtype).

    Raises:
        ValueError: a shape, dtype, device, segment, norm or backend outside this contract.
    """
    rows = (gate, shift, scale)
    return _call("gate_residual_adaln", x, branch, rows, segment_length, norm, weight, bias, eps, backend)[:2]


def gate_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    segment_length: int | Sequence[int],
    backend: str | None = None,
) -> torch.Tensor:
    """h = x + gate * branch, with one gate row per segment (B, S, C) or (B, S, 1, C), or per token (B, T, C).

    Arguments, errors and dtypes as in `gate_residual_adaln`; h (B, T, C) has x's dtype.
    """
    rows = (gate, None, None)
    return _call("gate_residual", x, branch, rows, segment_length, None, None, None, NORM_EPS, backend)[0]


def _call(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    rows: tuple[torch.Tensor | None, ...],
    segment_length: int | Sequence[int],
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    backend: str | None,
) -> Outputs:
    """Check what `op` was called with, and call; h, y, mean, rstd."""
    spec.check_activation(op, "x", x)
    if op != "adaln_modulate":
        spec.check_activation(op, "branch", branch, like=x)
    gate, shift, scale = rows
    lengths = spec.check_rows(op, x, {"gate": gate, "shift": shift, "scale": scale}, segment_length)
    if op != "gate_residual":
        spec.check_norm(op, x, norm, weight, bias)
        eps = spec.check_eps(op, eps)
    chosen = resolve(op, backend, x.device, x.dtype, x.shape[-1])
    inputs = [
        tensor if tensor is None or (tensor.stride(-1) == 1 and tensor.dim() < 4) else _readable(tensor)
        for tensor in (x, branch, gate, shift, scale, weight, bias)
    ]
    return adaln_op(*inputs, lengths, norm, eps, autocast_dtype(x.device) or x.dtype, chosen)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """(B, S, 1, C) as (B, S, C), with a contiguous last dim."""
    x = x.select(2, 0) if x.dim() == 4 else x
    return x if x.stride(-1) == 1 else x.contiguous()
