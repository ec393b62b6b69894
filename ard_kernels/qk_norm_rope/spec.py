"""Norm and rotary embedding of q and k, said once: formulas, shapes, validation.

A *section* x (B, T, H, D) is q, or k, or one of them in a packed qkv; H is its own number of heads. Per token, head:

    n = (x - m) * rstd      rstd = 1 / sqrt(mean((x - m)^2) + eps), m = mean(x) ("layer") or 0 ("rms")
    z = n * weight + bias   both means over D ("head") or over all H * D channels of the token ("all"); no norm: z = x
    y_a = z_a cos - z_b sin,  y_b = z_b cos + z_a sin        for the P pairs (a, b); elements past 2 P: y = z

Pair i is (2i, 2i + 1), "interleaved", or (i, i + P), "half". Nothing is rounded between x and y.

Tables cos, sin are (B or 1, L, H or 1, P) inside; token t reads row t % L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ard_kernels.block_causal_attention.spec import check_dtype_and_head_dim, empty_output
from ard_kernels.common.arguments import check_int, check_number, check_tensor, described
from ard_kernels.common.dtypes import accumulation_dtype

NORMS = ("rms", "layer")
OVER = ("head", "all")
PAIRS = ("interleaved", "half")
LAYOUTS = ("bhtd", "bthd")


class Rule(NamedTuple):
    """What is done to a section, besides its tensors."""

    norm: str  # one of NORMS, or "none"
    over_all: bool  # statistics over all heads of a token
    half: bool  # pairs (i, i + P)
    eps: float


def most_heads(head_dim: int) -> int:
    """A token's heads, at most: what a GPU's thread block holds in registers. 64 of 128, 96 of 72."""
    return 32 * (256 // head_dim)


def check_x(op: str, name: str, x: torch.Tensor, layout: str) -> None:
    """ValueError unless x is (B, H, T, D) or (B, T, H, D) by layout, or (B, T, 3, H, D) by "packed"."""
    check_tensor(op, name, x)
    dims = {"bhtd": "4 dims (B, H, T, D)", "bthd": "4 dims (B, T, H, D)", "packed": "5 dims (B, T, 3, H, D)"}[layout]
    if x.dim() != int(dims[0]) or (layout == "packed" and x.shape[2] != 3):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected {dims}")
    check_dtype_and_head_dim(op, name, x.dtype, x.shape[-1])
    heads, most = x.shape[1 if layout == "bhtd" else -2], most_heads(x.shape[-1])
    if heads > most:
        raise ValueError(f"{op}: {name} has {heads} heads of {x.shape[-1]}; expected at most 32 * (256 // D) = {most}")


def check_pair(op: str, q: torch.Tensor, k: torch.Tensor, layout: str) -> None:
    """ValueError unless k fits q: the same batch, tokens, head dim, dtype and device."""
    check_x(op, "k", k, layout)
    head = layout.index("h")
    if q.shape[:head] != k.shape[:head] or q.shape[head + 1 :] != k.shape[head + 1 :]:
        raise ValueError(
            f"{op}: k has shape {tuple(k.shape)}; expected q's {tuple(q.shape)} but for the heads (layout {layout!r})"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"{op}: k is {k.dtype} on {k.device}; expected q's {q.dtype} on {q.device}")


def check_rule(op: str, norm: object, over: object, pairs: object, eps: object) -> Rule:
    """The settings as a Rule, or a ValueError."""
    if norm is not None and norm not in NORMS:
        raise ValueError(f"{op}: norm is {described(norm)}; expected 'rms', 'layer' or None")
    if over not in OVER:
        raise ValueError(f"{op}: over is {described(over)}; expected 'head' or 'all'")
    if pairs not in PAIRS:
        raise ValueError(f"{op}: pairs is {described(pairs)}; expected 'interleaved' or 'half'")
    value = check_number(op, "eps", eps, "a number >= 0")
    if not value >= 0:
        raise ValueError(f"{op}: eps is {eps}; expected a number >= 0")
    return Rule("none" if norm is None else str(norm), over == "all", pairs == "half", value)


def check_parameter(
    op: str, name: str, parameter: torch.Tensor | None, rule: Rule, heads: int, like: torch.Tensor
) -> None:
    """ValueError unless the parameter is None or fits `heads` heads of like's head dim, dtype and device."""
    if parameter is None:
        return
    check_tensor(op, name, parameter)
    if rule.norm == "none":
        raise ValueError(f"{op}: {name} is given without a norm; expected None, or norm 'rms' or 'layer'")
    if name.endswith("bias") and rule.norm != "layer":
        raise ValueError(f"{op}: {name} is given with norm {rule.norm!r}; expected None (norm 'layer' has one)")
    D = like.shape[-1]
    expected, formula = ((heads * D,), "(H * D,)") if rule.over_all else ((D,), "(D,)")
    if tuple(parameter.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}; expected {formula} = {expected}")
    if parameter.dtype not in (like.dtype, torch.float32):
        raise ValueError(f"{op}: {name} has dtype {parameter.dtype}; expected {like.dtype} as q, or torch.float32")
    if parameter.device != like.device:
        raise ValueError(f"{op}: {name} is on {parameter.device}; expected q's {like.device}")


def check_table(op: str, name: str, table: torch.Tensor, like: torch.Tensor) -> None:
    """ValueError unless the table's dtype and device fit `like`, and it is a constant."""
    check_tensor(op, name, table)
    if table.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, and none flows to it; expected a constant table")
    if table.dtype not in (like.dtype, torch.float32):
        raise ValueError(f"{op}: {name} has dtype {table.dtype}; expected {like.dtype} as q, or torch.float32")
    if table.device != like.device:
        raise ValueError(f"{op}: {name} is on {table.device}; expected q's {like.device}")


def check_tables(
    op: str, cos: torch.Tensor | None, sin: torch.Tensor | None, segment_length: int | None, like: torch.Tensor,
    batch: int, tokens: int, heads: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """cos and sin as (B or 1, L, H or 1, P) views, or None when there are none; ValueError for what does not fit."""
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: {'cos' if cos is None else 'sin'} is None; expected both tables or none")
    length = tokens
    if segment_length is not None:
        length = check_int(op, "segment_length", segment_length, 1, "tokens")
        if tokens % length:
            raise ValueError(f"{op}: q has {tokens} tokens; expected a multiple of segment_length={length}")
    if cos is None or sin is None:
        return None
    for name, table in (("cos", cos), ("sin", sin)):
        check_table(op, name, table, like)
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(f"{op}: sin is {described(sin)}; expected cos's {tuple(cos.shape)}, {cos.dtype}")
    if not 2 <= cos.dim() <= 4:
        raise ValueError(f"{op}: cos has shape {tuple(cos.shape)}; expected (T, P), (B, T, P) or (B, T, H, P)")
    place = (None,) * (cos.dim() == 2) + (slice(None),) * (cos.dim() - 1) + (None,) * (cos.dim() < 4)
    cos, sin = cos[place], sin[place]
    rows, P = (cos.shape[1], cos.shape[3])
    if rows != length:
        what = "the tokens of q" if segment_length is None else "segment_length"
        raise ValueError(f"{op}: cos has {rows} rows; expected {length}, {what}")
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"{op}: cos is for {cos.shape[0]} samples; expected 1 or {batch}")
    if cos.shape[2] != 1 and any(count != cos.shape[2] for count in heads):
        raise ValueError(f"{op}: cos is for {cos.shape[2]} heads; expected 1 or {' and '.join(map(str, heads))}")
    if not 1 <= P <= like.shape[-1] // 2:
        raise ValueError(f"{op}: cos has {P} pairs; expected 1 to D / 2 = {like.shape[-1] // 2}")
    return dense_last(cos), dense_last(sin)


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless its last dim is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def sections(x: torch.Tensor) -> list[torch.Tensor]:
    """x (B, H, T, D) as one section (B, T, H, D), or q, k, v of (B, T, 3, H, D)."""
    return [x.transpose(1, 2)] if x.dim() == 4 else list(x.unbind(2))


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Empty memory for what comes of x, or for its gradient: (B, H, T, D) over (B, T, H, D) memory, or packed."""
    return empty_output(x) if x.dim() == 4 else torch.empty_like(x, memory_format=torch.contiguous_format)


def statistics_shape(x: torch.Tensor, over_all: bool) -> tuple[int, ...]:
    """(N, B, T, G) of mean and rstd: N = 1, or 2 of packed q and k; G = H, or 1 over all heads."""
    B, T, H = sections(x)[0].shape[:3]
    return 1 if x.dim() == 4 else 2, B, T, 1 if over_all else H


def empty_statistics(x: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for mean ("layer" alone) and rstd; empty ones for what a rule lacks."""
    dtype, shape = accumulation_dtype(x.dtype), statistics_shape(x, rule.over_all)
    mean = x.new_empty(shape if rule.norm == "layer" else (0,), dtype=dtype)
    return mean, x.new_empty((0,) if rule.norm == "none" else shape, dtype=dtype)
