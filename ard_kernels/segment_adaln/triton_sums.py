# mypy: allow-untyped-defs, no-strict-optional
# (Inputs that a call lacks are None, in groups that their types do not know.)
"""The adaLN family's backward in Triton, what follows the pass over the tokens: partial sums are added up in order."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.common.triton_support import Launch, strides

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype


def layout(x: Tensor | None) -> Layout | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple([None if x is None else x.dtype for x in tensors])


@triton.jit(do_not_specialize=["chunk_count", "S"])
def _add_chunks(
    workspace, dgate, dshift, dscale, scale, weight, bias, parameter_sums, spans, scale_stride, chunk_count, S,
    C: tl.constexpr, UNIT: tl.constexpr, GATE_SUM: tl.constexpr, NORM_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate, dshift, dscale (B, S, C) of one segment, BLOCK columns, from its chunks' partial sums, in order; and its
    share (B * S, 2, C) of dbias and dweight."""
    SUMS: tl.constexpr = GATE_SUM + 2 * NORM_SUMS
    row = tl.program_id(0)
    span = spans + row % S * 2
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    to = row.to(tl.int64) * C + columns
    factor = 1.0
    if parameter_sums is not None and scale is not None:
        scale_row = (
            scale + ((row // S).to(tl.int64) * scale_stride[0] + (row % S).to(tl.int64) * scale_stride[1]) * UNIT
        )
        factor += tl.load(scale_row + columns, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(SUMS):
        total = tl.zeros([BLOCK], tl.float32)
        for chunk in range(tl.load(span), tl.load(span + 1)):
            partial = ((row // S).to(tl.int64) * chunk_count + chunk) * SUMS + k
            total += tl.load(workspace + partial * C + columns, mask=inside, other=0.0)
        if k < GATE_SUM:
            tl.store(dgate + to, total.to(dgate.dtype.element_ty), mask=inside)
        else:
            if parameter_sums is not None:
                of_row = parameter_sums + (row.to(tl.int64) * 2 + k - GATE_SUM) * C
                tl.store(of_row + columns, total * factor, mask=inside)
            if k == GATE_SUM:
                shifts = total
                if dshift is not None:
                    tl.store(dshift + to, total.to(dshift.dtype.element_ty), mask=inside)
            elif dscale is not None:
                if weight is not None:
                    total *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
                if bias is not None:
                    total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32) * shifts
                tl.store(dscale + to, total.to(dscale.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _add_parameters(parameter_sums, dbias, dweight, count, C: tl.constexpr, BLOCK: tl.constexpr):
    """dbias and dweight (C,), BLOCK columns: the sums of (count, 2, C), in order."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    for k in tl.static_range(2):
        out = dbias if k == 0 else dweight
        if out is not None:
            total = tl.zeros([BLOCK], tl.float32)
            share = parameter_sums + k * C + columns
            for _ in range(count):
                total += tl.load(share, mask=inside, other=0.0)
                share += 2 * C
            tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


@lru_cache(maxsize=1024)
def _prepare_sums(
    shape_BSC: torch.Size, scale: Layout | None, others: tuple[torch.dtype | None, ...], device: torch.device,
    chunk_count: int, flags: tuple[tuple[str, bool], ...],
) -> Launch:  # fmt: skip
    """The launch that adds the chunks' partial sums up; `others`: dtypes of all tensors, None: absent."""
    B, S, C = shape_BSC
    unit, (stride,) = strides((shape_BSC, (S * C, C, 1)) if scale is None else scale[:2])
    constants = {"C": C, "UNIT": unit, "BLOCK": 256, "num_warps": 2}
    return Launch(_add_chunks, (B * S, triton.cdiv(C, 256)), (stride, chunk_count, S), constants | dict(flags))


@lru_cache(maxsize=1024)
def _prepare_parameters(C: int, others: tuple[torch.dtype | None, ...], device: torch.device) -> Launch:
    """The launch that adds dbias and dweight up; its grid is theirs alone, so that the count may be any."""
    return Launch(_add_parameters, (triton.cdiv(C, 64),), (), {"C": C, "BLOCK": 64, "num_warps": 2})


def add_up(
    workspace: Tensor, grads: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...],
    sizes: tuple[int, int, int], spans: Tensor | None, flags: tuple[tuple[str, bool], ...],
) -> None:  # fmt: skip
    """Those of dgate, dshift, dscale, dweight, dbias that are wanted, from the chunks' sums (B, chunks, 1 to 3, C).

    parameters: scale, weight, bias. sizes: B, chunks, C. spans: of the segments; None: rows per token, of which only
    dweight and dbias come from sums. flags: GATE_SUM and NORM_SUMS, which sums there are.
    """
    dgate, dshift, dscale, dweight, dbias = grads
    B, chunk_count, C = sizes
    of_parameters = dweight is not None or dbias is not None
    parameter_sums, shares = workspace, B * chunk_count
    if spans is not None and any(summed for _, summed in flags):
        S = len(spans)
        parameter_sums = workspace.new_empty(B * S * 2 * C) if of_parameters else None
        shares = B * S
        tensors = workspace, dgate, dshift, dscale, *parameters, parameter_sums
        scale = layout(parameters[0])
        add = _prepare_sums(torch.Size((B, S, C)), scale, dtypes(*tensors), workspace.device, chunk_count, flags)
        add((*tensors, spans))
    if of_parameters:
        shared = parameter_sums, dbias, dweight
        _prepare_parameters(C, dtypes(*shared), workspace.device)(shared, (shares,))
