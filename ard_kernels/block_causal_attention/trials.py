"""What attention is checked with on a machine it has not run on: every class of tiles, and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.mask import SegmentMask, causal_code
from ard_kernels.block_causal_attention.op import OP, forward_op
from ard_kernels.common.arguments import check_scale
from ard_kernels.common.self_check import Draw, Tensors, Trial, Unit

BLIND = SegmentMask([[True, False, True], [False, False, False]])
# label, mask, lengths of queries and of keys (None: the same), heads of queries and of keys
CALLS = (
    ("whole tiles", causal_code(None, 0), (128, 128), None, 2, 2),
    ("boundary tiles, window and sink", causal_code(2, 1), (100, 60, 96), None, 2, 1),
    ("teacher forcing", SegmentMask.teacher_forcing(3).code, (40, 17, 24) * 2, None, 2, 2),
    (
        "other keys, some queries see none",
        BLIND.code,
        (33, 20),
        (16, 50, 70),
        4,
        2,
    ),
)


def trials(draw: Draw, dtype: torch.dtype, head_dim: int) -> Iterator[Trial]:
    """Of out and lse, and of their gradients in q, k, v: views of one projection where they are of equal length."""
    for label, code, lengths, k_lengths, heads, kv_heads in CALLS:
        T, k_tokens = sum(lengths), sum(k_lengths or lengths)
        if k_lengths is None:
            packed = draw(2, T, heads + 2 * kv_heads, head_dim, dtype=dtype)
            parts = [x.transpose(1, 2) for x in packed.split([heads, kv_heads, kv_heads], 2)]
        else:
            parts = [draw(2, count, n, head_dim, dtype=dtype) for count, n in ((heads, T), *[(kv_heads, k_tokens)] * 2)]

        how = code, list(lengths), list(k_lengths or lengths)
        yield Trial(label, dict(zip("qkv", parts, strict=True)), partial(_call, how=how))


def _call(backend: str, q: Tensor, k: Tensor, v: Tensor, how: tuple[str, list[int], list[int]]) -> Tensors:
    out, lse = forward_op(q, k, v, *how, check_scale(OP, None, q.shape[-1]), backend)
    return {"out": out, "lse": lse}


UNIT = Unit(OP, trials, (64, 72, 128))
