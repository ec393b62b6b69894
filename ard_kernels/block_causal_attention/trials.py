"""What attention is checked with on a machine it has not run on: every class of tiles, and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.mask import SegmentMask, causal_code
from ard_kernels.block_causal_attention.op import OP, forward_op, packed_op
from ard_kernels.common.arguments import check_scale
from ard_kernels.common.self_check import Draw, Tensors, Trial, Unit


class Call(NamedTuple):
    """lengths: of segments of queries, and of keys unless those have their own. packed: out alone is differentiated,
    into memory of q, k and v in one, as a student's training does."""

    label: str
    mask: str
    lengths: tuple[int, ...]
    k_lengths: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 2
    packed: bool = False


BLIND = SegmentMask([[True, False, True], [False, False, False]])
CALLS = (
    Call("whole tiles, packed", causal_code(None, 0), (128, 128), packed=True),
    Call("short segments", causal_code(None, 0), (16,) * 4),
    Call("boundary tiles, window and sink", causal_code(2, 1), (100, 60, 96), kv_heads=1),
    Call("teacher forcing", SegmentMask.teacher_forcing(3).code, (40, 17, 24) * 2),
    Call("other keys, some queries see none", BLIND.code, (33, 20), (16, 50, 70), heads=4),
)


def _given(lengths: tuple[int, ...]) -> list[int]:
    """As public functions pass them: one number for segments of equal length, which other tile sizes are tuned for."""
    return [lengths[0]] if len(set(lengths)) == 1 else list(lengths)


def trials(draw: Draw, dtype: torch.dtype, head_dim: int) -> Iterator[Trial]:
    """Of out and lse, and of their gradients in q, k, v: views of one projection where they are of equal length."""
    for call in CALLS:
        T, k_tokens = sum(call.lengths), sum(call.k_lengths or call.lengths)
        counts = call.heads, call.kv_heads, call.kv_heads
        lengths = _given(call.lengths)
        how = call.mask, lengths, _given(call.k_lengths) if call.k_lengths else lengths
        if call.packed:
            inputs = {"qkv": draw(2, T, 3, call.heads, head_dim, dtype=dtype)}
            yield Trial(call.label, inputs, partial(_call_packed, how=how[:2]))
            continue
        if call.k_lengths is None:
            projection = draw(2, T, sum(counts), head_dim, dtype=dtype)
            parts = [x.transpose(1, 2) for x in projection.split(counts, 2)]
        else:
            tokens = T, k_tokens, k_tokens
            parts = [draw(2, count, n, head_dim, dtype=dtype) for count, n in zip(counts, tokens, strict=True)]
        yield Trial(call.label, dict(zip("qkv", parts, strict=True)), partial(_call, how=how))


def _call(backend: str, q: Tensor, k: Tensor, v: Tensor, how: tuple[str, list[int], list[int]]) -> Tensors:
    out, lse = forward_op(q, k, v, *how, check_scale(OP, None, q.shape[-1]), backend)
    return {"out": out, "lse": lse}


def _call_packed(backend: str, qkv: Tensor, how: tuple[str, list[int]]) -> Tensors:
    return {"out": packed_op(qkv, *how, check_scale(OP, None, qkv.shape[-1]), backend)[0]}


UNIT = Unit(OP, trials, (64, 72, 128))
