"""adaLN-Zero with one row of (shift, scale, gate) per segment: modulated LayerNorm and the gated residual before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.common.autocast import autocast_dtype
from ard_kernels.common.backends import resolve
from ard_kernels.segment_adaln import spec
from ard_kernels.segment_adaln.op import gate_op, gated_op, modulate_op

__all__ = ["adaln_modulate", "gate_residual", "gate_residual_adaln"]


def _dense_last(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    segment_length: int | Sequence[int],
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> torch.Tensor:
    """y = LN(x) * (1 + scale) + shift, LayerNorm over C without affine parameters.

    Args:
        x: (B, T, C) fp32, bf16 or fp16 (fp64 on the torch backend); any strides with a contiguous last dim.
        shift, scale: (B, S, C) one row per segment, or (B, T, C) one per token; one dtype, which may differ from x's
            (float64 with float64 x only).
            Strided chunks of one (B, S, 6C) projection are read in place.
        segment_length: tokens per segment L (T = S * L), or the S lengths of ragged segments.
        eps: added to the variance.
        backend: None chooses; see `ard_kernels.backends()`.

    Returns:
        y (B, T, C) in x's dtype; under autocast in the autocast dtype, since a matmul reads it next. Statistics and
        arithmetic are fp32.

    Raises:
        ValueError: a shape, dtype, device, segment or backend outside this contract.

    Source: adaLN-Zero of DiT (arXiv 2212.09748, Fig. 3), conditioned per trajectory step in ARD (arXiv 2504.11295).
    """
    op = "adaln_modulate"
    spec.check_activation(op, "x", x)
    lengths = spec.check_rows(op, x, {"shift": shift, "scale": scale}, segment_length)
    eps = spec.check_eps(op, eps)
    chosen = resolve(op, backend, x.device, x.dtype, x.shape[-1])
    x, shift, scale = _dense_last(x, shift, scale)
    return modulate_op(x, shift, scale, lengths, eps, autocast_dtype(x.device) or x.dtype, chosen)[0]


def gate_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    segment_length: int | Sequence[int],
    eps: float = NORM_EPS,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + gate * branch and y = LN(h) * (1 + scale) + shift in one pass: the seam between two DiT sub-blocks.

    Args:
        x, branch: (B, T, C); branch (the attention's or MLP's output) may have another dtype than x, the residual.
        gate, shift, scale: as the rows of `adaln_modulate`, all of one shape and dtype.
        segment_length, eps, backend: as in `adaln_modulate`.

    Returns:
        (h, y): h in x's dtype, y as in `adaln_modulate`. LN reads h as stored (rounded to its dtype).

    Raises:
        ValueError: a shape, dtype, device, segment or backend outside this contract.
    """
    op = "gate_residual_adaln"
    spec.check_activation(op, "x", x)
    spec.check_activation(op, "branch", branch, like=x)
    lengths = spec.check_rows(op, x, {"gate": gate, "shift": shift, "scale": scale}, segment_length)
    eps = spec.check_eps(op, eps)
    chosen = resolve(op, backend, x.device, x.dtype, x.shape[-1])
    x, branch, gate, shift, scale = _dense_last(x, branch, gate, shift, scale)
    y_dtype = autocast_dtype(x.device) or x.dtype
    return gated_op(x, branch, gate, shift, scale, lengths, eps, y_dtype, chosen)[:2]


def gate_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    *,
    segment_length: int | Sequence[int],
    backend: str | None = None,
) -> torch.Tensor:
    """h = x + gate * branch, with one gate row per segment (B, S, C) or per token (B, T, C).

    Arguments, errors and dtypes as in `gate_residual_adaln`; h (B, T, C) has x's dtype.
    """
    op = "gate_residual"
    spec.check_activation(op, "x", x)
    spec.check_activation(op, "branch", branch, like=x)
    lengths = spec.check_rows(op, x, {"gate": gate}, segment_length)
    chosen = resolve(op, backend, x.device, x.dtype, x.shape[-1])
    x, branch, gate = _dense_last(x, branch, gate)
    return gate_op(x, branch, gate, lengths, chosen)
