"""Every op in plain PyTorch, in the dtypes of its inputs: what users write, and what the oracle measures by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.segment_adaln.spec import row_of_token

EPS = 1e-6
TAKES = {  # arguments of the adaLN family
    "adaln_modulate": ("x", "shift", "scale"),
    "gate_residual_adaln": ("x", "branch", "gate", "shift", "scale"),
    "gate_residual": ("x", "branch", "gate"),
}


def attention(q, k, v, sees_TT: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T where sees, -inf elsewhere) v of (..., T, D) and its log-sum-exp (..., T)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~sees_TT, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def segment_attention(q, k, v, sees: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with fewer heads of k and v, which query heads share; rows that see nothing get 0 and -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    blind = ~sees.any(-1)
    out, lse = attention(q, k, v, sees | blind[:, None], scale)
    return out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, float("-inf"))


def block_causal_attention(
    q, k, v, lengths: Sequence[int], window: int | None = None, sink: int = 0, scale: float | None = None
) -> torch.Tensor:
    """Attention of (B, H, T, D) under the dense mask."""
    return attention(q, k, v, dense_mask(lengths, q.shape[2], window, sink, q.device), scale)[0]


def history_attention(segments, window=None, sink=0, scale=None) -> torch.Tensor:
    """Outputs (B, H, T, D) of all steps, one after the other: (q, k, v) of each in `segments`, each (B, H, L_i, D)."""
    q, k, v = (torch.cat(parts, 2) for parts in zip(*segments, strict=True))
    lengths = [segment[0].shape[2] for segment in segments]
    return block_causal_attention(q, k, v, lengths, window, sink, scale)


def qk_norm(x_BTHD, kind: str | None, over: str = "head", weight=None, bias=None, eps: float = EPS) -> torch.Tensor:
    """x by PyTorch's norm over D, or over all heads of a token."""
    if kind is None:
        return x_BTHD
    x = x_BTHD.flatten(2) if over == "all" else x_BTHD
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).view(x_BTHD.shape)
    return F.rms_norm(x, x.shape[-1:], weight, eps).view(x_BTHD.shape)


def rotate(x_BTHD, cos, sin, pairs: str = "interleaved") -> torch.Tensor:
    """x * cos + (its pairs turned by 90 degrees) * sin; tables (B or 1, T, H or 1, P)."""
    P = cos.shape[-1]
    x, rest, (cos, sin) = x_BTHD[..., : 2 * P], x_BTHD[..., 2 * P :], (cos.to(x_BTHD.dtype), sin.to(x_BTHD.dtype))
    if pairs == "half":
        a, b = x.chunk(2, -1)
        turned, cos, sin = torch.cat([-b, a], -1), torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return torch.cat([x * cos + turned * sin, rest], -1)


def adaln(
    op: str,
    *inputs: torch.Tensor | None,
    lengths: Sequence[int] = (),
    eps: float = EPS,
    spread: Callable | None = None,
    norm: Callable | str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    y_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """The adaLN family: h = x + gate * branch, y = N(h) * (1 + scale) + shift; those of h, y that `op` returns.

    Args:
        inputs: those of TAKES[op]; rows may be None.
        lengths: of the segments; [1] for rows per token.
        spread: (B, S, C) or (B, S, 1, C) rows to (B, T, C), each token's; default by `lengths`.
        norm: over the last dim; or PyTorch's LayerNorm, "layer", or RMSNorm, "rms", with `eps`.
        weight, bias: (C,), of the norm.
        y_dtype: of y; default that of x.
    """
    x, branch, gate, shift, scale = (
        dict(zip(TAKES[op], inputs, strict=True)).get(name) for name in ("x", "branch", "gate", "shift", "scale")
    )
    if isinstance(norm, str):
        norm = partial(F.layer_norm if norm == "layer" else F.rms_norm, normalized_shape=x.shape[-1:], eps=eps)
    if spread is None:
        row_T = row_of_token(lengths, x.shape[1], x.device)

        def spread(rows):
            return rows.flatten(1, -2)[:, row_T]

    h = x
    if branch is not None:
        h = (x + (branch if gate is None else spread(gate) * branch)).to(x.dtype)
    if op == "gate_residual":
        return (h,)
    y = norm(h)
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        y = y if parameter is None else combine(y, parameter)
    y = y if scale is None else y * (1 + spread(scale))
    y = (y if shift is None else y + spread(shift)).to(y_dtype or x.dtype)
    return (y,) if branch is None else (h, y)
