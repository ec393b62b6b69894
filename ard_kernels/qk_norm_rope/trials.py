"""What norm and rotation of q and k are checked with: every head dim of a width, both norms, both orders of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.common.self_check import Draw, Tensors, Trial, Unit
from ard_kernels.qk_norm_rope.op import OP, forward_op
from ard_kernels.qk_norm_rope.spec import most_heads

TOKENS = 60


def _call(
    backend: str, x: Tensor, q_weight: Tensor, q_bias: Tensor | None = None, k_weight: Tensor | None = None,
    k_bias: Tensor | None = None, *, tables: tuple[Tensor, Tensor], norm: str, over_all: bool, half: bool,
) -> Tensors:  # fmt: skip
    cos, sin = (table.to(x.device) for table in tables)
    rule = norm, over_all, half, NORM_EPS
    return {"y": forward_op(x, q_weight, k_weight, q_bias, k_bias, cos, sin, *rule, backend)[0]}


def _head_dims(width: int) -> list[int]:
    """Those of `width` channels that models have: 128, 72 and 64; else a small one, or all of it, up to 256."""
    fits = [D for D in (128, 72, 64, 8) if width % D == 0 and width // D <= most_heads(D)]
    return [D for D in fits if D > 8] or fits or [width]


def trials(draw: Draw, dtype: torch.dtype, width: int) -> Iterator[Trial]:
    """width: heads times head dim."""
    for D in _head_dims(width):
        k = draw(2, TOKENS, width // D, D, dtype=dtype).transpose(1, 2)
        angles = draw(1, TOKENS, 1, D // 2)
        tables = angles.cos(), angles.sin()
        call = partial(_call, tables=tables, norm="rms", over_all=False, half=False)
        yield Trial(f"RMSNorm of heads of {D}", {"x": k, "q_weight": draw(D)}, call)
    D = _head_dims(width)[0]
    H, pairs = width // D, max(1, D // 2 - 2)  # the last elements of a head are not turned
    angles = draw(1, TOKENS, 1, pairs)
    call = partial(_call, tables=(angles.cos(), angles.sin()))
    q = draw(2, TOKENS, H, D, dtype=dtype).transpose(1, 2)
    weights = {"q_weight": draw(D), "q_bias": draw(D)}
    yield Trial(
        "LayerNorm with bias, half pairs", {"x": q, **weights}, partial(call, norm="layer", over_all=False, half=True)
    )
    qkv = draw(2, TOKENS, 3, H, D, dtype=dtype)
    packed = {"x": qkv, "q_weight": draw(width), "k_weight": draw(width)}
    yield Trial("packed, RMSNorm over all heads", packed, partial(call, norm="rms", over_all=True, half=False))


UNIT = Unit(OP, trials, (1152, 1536))
