# mypy: allow-untyped-defs, disable-error-code=assignment, no-strict-optional
# (Inputs that an op lacks are None, in groups that their types do not know.)
"""The adaLN family in Triton: one pass over the tokens forward, one backward and a small sum of row gradients.

A program takes a chunk of tokens of one segment of one sample: the segment's gate, shift and scale are read once and
stay in registers while the tokens pass by, ROWS at a time. Backward, the row gradients of a chunk are summed in
registers, written once as fp32 partials, and added in chunk order by a second kernel: no atomics, so bit-equal results.
Rows per token are read, and their gradients written, with the token.

    n = (h - mean) * rstd      y = n * (1 + scale) + shift      h = x + gate * branch (or x)
    g = dy * (1 + scale)       dx = rstd * (g - mean(g) - n * mean(g * n)) + dh
    dshift = sum dy            dscale = sum dy * n              dgate = sum dx * branch, dbranch = gate * dx
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import keep_if_captured, multiprocessors, on_device
from ard_kernels.common.triton_parts import (
    add_rows,
    load_rows,
    multiply_rows,
    part_start,
    part_width,
    row_sums,
    scale_rows,
    split_width,
    store_rows,
    sum_rows,
    widen_rows,
    zero_rows,
)
from ard_kernels.common.triton_support import Launch, strides
from ard_kernels.segment_adaln.chunks import Chunks, chunk_tokens, chunks

# Arguments of which Triton shall not compile one variant that are multiples of 16 and one that are not.
SIZES = ["T", "chunk_count", "S"]
# Wider rows of gate and scale are read again for every token backward: beside three sums they would spill.
KEPT_WIDTH = 4096


@triton.jit
def _token_rows(pointer, stride, batch, tokens, UNIT: tl.constexpr):
    """Addresses of `tokens` of one sample; 64-bit."""
    return pointer + (batch.to(tl.int64) * stride[0] + tokens.to(tl.int64) * stride[1]) * UNIT


@triton.jit
def _load(pointer, stride, batch, tokens, here, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """fp32 rows of `tokens`, 0 where not here."""
    return widen_rows(load_rows(_token_rows(pointer, stride, batch, tokens, UNIT), here, C, PARTS))


@triton.jit
def _store(pointer, stride, batch, tokens, blocks, here, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    store_rows(_token_rows(pointer, stride, batch, tokens, UNIT), blocks, here, C, PARTS)


@triton.jit
def _round(blocks, pointer):
    """What memory of the pointer's dtype would hold, in fp32."""
    rounded = ()
    for i in tl.static_range(len(blocks)):
        rounded = rounded + (blocks[i].to(pointer.dtype.element_ty).to(tl.float32),)
    return rounded


@triton.jit
def _centre(blocks, mean, C: tl.constexpr, PARTS: tl.constexpr):
    """blocks - mean, 0 in the columns past C."""
    centred = ()
    for i in tl.static_range(len(PARTS)):
        difference = blocks[i] - mean[:, None]
        if part_start(PARTS, i) + part_width(PARTS, i) > C:
            columns = part_start(PARTS, i) + tl.arange(0, part_width(PARTS, i))
            difference = tl.where((columns < C)[None, :], difference, 0.0)
        centred = centred + (difference,)
    return centred


@triton.jit
def _modulate(n, rstd, shift, scale):
    """n * rstd * (1 + scale) + shift."""
    blocks = ()
    for i in tl.static_range(len(n)):
        blocks = blocks + (n[i] * rstd[:, None] * (1.0 + scale[i]) + shift[i],)
    return blocks


@triton.jit
def _chunk(table, chunk_count):
    """(sample, segment, first and stop token) of this program's chunk."""
    entry = table + tl.program_id(0) % chunk_count * 3
    return tl.program_id(0) // chunk_count, tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, branch, gate, shift, scale, h, y, mean, rstd, table, x_stride, branch_stride, gate_stride, shift_stride,
    scale_stride, h_stride, y_stride, T, chunk_count, eps,
    C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h, y, mean and rstd of one chunk, those that the op has."""
    batch, segment, start, stop = _chunk(table, chunk_count)
    one = segment + tl.arange(0, 1)
    if HAS_GATE and not PER_TOKEN:
        gate_row = _load(gate, gate_stride, batch, one, one >= 0, C, PARTS, UNIT)
    if HAS_NORM and not PER_TOKEN:
        shift_row = _load(shift, shift_stride, batch, one, one >= 0, C, PARTS, UNIT)
        scale_row = _load(scale, scale_stride, batch, one, one >= 0, C, PARTS, UNIT)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        here = tokens < stop
        rows = _load(x, x_stride, batch, tokens, here, C, PARTS, UNIT)
        if HAS_GATE:
            gate_here = _load(gate, gate_stride, batch, tokens, here, C, PARTS, UNIT) if PER_TOKEN else gate_row
            branch_rows = _load(branch, branch_stride, batch, tokens, here, C, PARTS, UNIT)
            rows = _round(add_rows(rows, multiply_rows(gate_here, branch_rows)), h)
            _store(h, h_stride, batch, tokens, rows, here, C, PARTS, UNIT)
        if HAS_NORM:
            if PER_TOKEN:
                shift_here = _load(shift, shift_stride, batch, tokens, here, C, PARTS, UNIT)
                scale_here = _load(scale, scale_stride, batch, tokens, here, C, PARTS, UNIT)
            else:
                shift_here, scale_here = shift_row, scale_row
            means = row_sums(rows) / C
            centred = _centre(rows, means, C, PARTS)
            rstds = tl.rsqrt(row_sums(multiply_rows(centred, centred)) / C + eps)
            _store(y, y_stride, batch, tokens, _modulate(centred, rstds, shift_here, scale_here), here, C, PARTS, UNIT)
            statistics = batch.to(tl.int64) * T + tokens
            tl.store(mean + statistics, means, mask=here)
            tl.store(rstd + statistics, rstds, mask=here)


@triton.jit
def _norm_gradient(dy, n, scale, rstd, C: tl.constexpr):
    """dx of y = n * (1 + scale) + shift through the statistics."""
    g = ()
    for i in tl.static_range(len(dy)):
        g = g + (dy[i] * (1.0 + scale[i]),)
    mean_g, mean_gn = row_sums(g) / C, row_sums(multiply_rows(g, n)) / C
    dx = ()
    for i in tl.static_range(len(dy)):
        dx = dx + (rstd[:, None] * (g[i] - mean_g[:, None] - n[i] * mean_gn[:, None]),)
    return dx


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad_h, grad_y, h, branch, gate, scale, mean, rstd, dx, dbranch, dgate, dshift, dscale, workspace, table,
    grad_h_stride, grad_y_stride, h_stride, branch_stride, gate_stride, scale_stride, dx_stride, dbranch_stride,
    dgate_stride, dshift_stride, dscale_stride, T, chunk_count,
    C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, HAS_GRAD_H: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr, PER_TOKEN: tl.constexpr, KEEP_ROWS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dbranch of one chunk, and its share of dgate, dshift, dscale; those that the op has."""
    batch, segment, start, stop = _chunk(table, chunk_count)
    one = segment + tl.arange(0, 1)
    if HAS_GATE and KEEP_ROWS:
        gate_row = _load(gate, gate_stride, batch, one, one >= 0, C, PARTS, UNIT)
    if HAS_NORM and KEEP_ROWS:
        scale_row = _load(scale, scale_stride, batch, one, one >= 0, C, PARTS, UNIT)
    gate_sum, shift_sum, scale_sum = zero_rows(ROWS, PARTS), zero_rows(ROWS, PARTS), zero_rows(ROWS, PARTS)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        here = tokens < stop
        at, end = (tokens, stop) if PER_TOKEN else (one, segment + 1)  # rows read with every token
        gradient = zero_rows(ROWS, PARTS)
        if HAS_GRAD_H:
            gradient = _load(grad_h, grad_h_stride, batch, tokens, here, C, PARTS, UNIT)
        if HAS_NORM:
            scale_here = scale_row if KEEP_ROWS else _load(scale, scale_stride, batch, at, at < end, C, PARTS, UNIT)
            dy = _load(grad_y, grad_y_stride, batch, tokens, here, C, PARTS, UNIT)
            rows = _load(h, h_stride, batch, tokens, here, C, PARTS, UNIT)
            statistics = batch.to(tl.int64) * T + tokens
            means = tl.load(mean + statistics, mask=here, other=0.0)
            rstds = tl.load(rstd + statistics, mask=here, other=0.0)
            n = scale_rows(_centre(rows, means, C, PARTS), rstds[:, None])
            gradient = add_rows(gradient, _norm_gradient(dy, n, scale_here, rstds, C))
            _store(dx, dx_stride, batch, tokens, gradient, here, C, PARTS, UNIT)
            dy_n = multiply_rows(dy, n)
            if PER_TOKEN:
                _store(dshift, dshift_stride, batch, tokens, dy, here, C, PARTS, UNIT)
                _store(dscale, dscale_stride, batch, tokens, dy_n, here, C, PARTS, UNIT)
            else:
                shift_sum, scale_sum = add_rows(shift_sum, dy), add_rows(scale_sum, dy_n)
        if HAS_GATE:
            gate_here = gate_row if KEEP_ROWS else _load(gate, gate_stride, batch, at, at < end, C, PARTS, UNIT)
            branch_rows = _load(branch, branch_stride, batch, tokens, here, C, PARTS, UNIT)
            _store(dbranch, dbranch_stride, batch, tokens, multiply_rows(gate_here, gradient), here, C, PARTS, UNIT)
            gate_gradient = multiply_rows(gradient, branch_rows)
            if PER_TOKEN:
                _store(dgate, dgate_stride, batch, tokens, gate_gradient, here, C, PARTS, UNIT)
            else:
                gate_sum = add_rows(gate_sum, gate_gradient)
    if not PER_TOKEN:  # (B, chunks, 1 to 3, C): gate, shift, scale
        SUMS: tl.constexpr = HAS_GATE + 2 * HAS_NORM
        partials = workspace + (tl.program_id(0).to(tl.int64) + tl.arange(0, 1)) * (SUMS * C)
        if HAS_GATE:
            store_rows(partials, sum_rows(gate_sum), one >= 0, C, PARTS)
        if HAS_NORM:
            store_rows(partials + HAS_GATE * C, sum_rows(shift_sum), one >= 0, C, PARTS)
            store_rows(partials + (HAS_GATE + 1) * C, sum_rows(scale_sum), one >= 0, C, PARTS)


@triton.jit(do_not_specialize=SIZES)
def _add_chunks(
    workspace, dgate, dshift, dscale, spans, chunk_count, S,
    C: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate, dshift, dscale (B, S, C) of one segment, BLOCK columns: its chunks' partials, in order."""
    SUMS: tl.constexpr = HAS_GATE + 2 * HAS_NORM
    row = tl.program_id(0)
    span = spans + row % S * 2
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    for k in tl.static_range(SUMS):
        total = tl.zeros([BLOCK], tl.float32)
        for chunk in range(tl.load(span), tl.load(span + 1)):
            partial = ((row // S).to(tl.int64) * chunk_count + chunk) * SUMS + k
            total += tl.load(workspace + partial * C + columns, mask=inside, other=0.0)
        if k < HAS_GATE:
            out = dgate
        elif k == HAS_GATE:
            out = dshift
        else:
            out = dscale
        tl.store(out + row.to(tl.int64) * C + columns, total.to(out.dtype.element_ty), mask=inside)


KERNELS = {"adaln_forward": _forward, "adaln_backward": _backward}
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides, dtype


@lru_cache(maxsize=1024)
def _prepare(
    name: str, shape_BTC: torch.Size, inputs: tuple[Layout | None, ...], y_dtype: torch.dtype | None,
    device: torch.device, lengths: tuple[int, ...], per_token: bool, few: int, eps: tuple[float, ...],
    flags: tuple[tuple[str, bool], ...], config: tuple[tuple[str, int], ...],
) -> tuple[Launch, Chunks]:  # fmt: skip
    """The launch of kernel `name` for inputs of these layouts (shape, strides, dtype; None: absent); its tables.

    few: multiprocessors. `eps`: (eps,) of the forward, () of the backward.
    """
    B, T, C = shape_BTC
    sizes = dict(config)
    tables = chunks((T,) if per_token else lengths, T, chunk_tokens(T, B, sizes.pop("TOKENS"), few), device)
    S = T if per_token else len(tables.spans)
    plain, rows = (shape_BTC, (T * C, C, 1)), ((B, S, C), (S * C, C, 1))
    outputs = (plain, plain) if name == "adaln_forward" else (plain, plain, rows, rows, rows)
    # The strides of an absent tensor are never used.
    unit, each = strides(*(plain if layout is None else layout[:2] for layout in inputs), *outputs)
    constants = (
        sizes | dict(flags) | {"C": C, "PARTS": split_width(C, least=8, most=3), "UNIT": unit, "PER_TOKEN": per_token}
    )
    if name == "adaln_backward":  # see KEPT_WIDTH
        constants["KEEP_ROWS"] = not per_token and C <= KEPT_WIDTH
    count = len(tables.chunks)
    return Launch(KERNELS[name], (B * count,), (tables.chunks, *each, T, count, *eps), constants), tables


@lru_cache(maxsize=1024)
def _prepare_sum(
    shape_BSC: torch.Size, dtype: torch.dtype, device: torch.device, chunk_count: int, has_gate: bool, has_norm: bool
) -> Launch:
    """The launch that adds the chunks' partial row gradients up."""
    B, S, C = shape_BSC
    constants = {"C": C, "HAS_GATE": has_gate, "HAS_NORM": has_norm, "BLOCK": 256, "num_warps": 2}
    return Launch(_add_chunks, (B * S, triton.cdiv(C, 256)), (chunk_count, S), constants)


def _prepared(
    name: str, like: Tensor, inputs: tuple[Tensor | None, ...], per_token: bool, lengths: Sequence[int],
    flags: dict[str, bool], y_dtype: torch.dtype | None = None, eps: tuple[float, ...] = (),
) -> tuple[Launch, Chunks]:  # fmt: skip
    """`_prepare` of kernel `name` for these inputs; `like` is (B, T, C)."""
    shape, device = like.shape, like.device
    config = tuning.lookup(name, device, like.dtype, shape[2])
    layouts = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs])
    run, tables = _prepare(
        name, shape, layouts, y_dtype, device, tuple(lengths), per_token, multiprocessors(device), eps,
        tuple(flags.items()), tuple(config.items()),
    )  # fmt: skip
    return run, keep_if_captured(tables)


@on_device
def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    h: Tensor | None, y: Tensor | None, mean: Tensor | None, rstd: Tensor | None, lengths: Sequence[int], eps: float,
) -> None:  # fmt: skip
    """See backend.py."""
    has_gate, has_norm = gate is not None, y is not None
    per_token = (gate if has_gate else shift).shape[1] == x.shape[1]
    inputs, y_dtype = (x, branch, gate, shift, scale), y.dtype if has_norm else None
    flags = {"HAS_GATE": has_gate, "HAS_NORM": has_norm}
    run, _ = _prepared("adaln_forward", x, inputs, per_token, lengths, flags, y_dtype, (eps,))
    run((*inputs, h, y, mean, rstd))


@on_device
def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, rstd: Tensor | None, dx: Tensor | None, dbranch: Tensor | None,
    dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None, lengths: Sequence[int],
) -> None:  # fmt: skip
    """See backend.py."""
    like = h if h is not None else grad_h
    has_gate, has_norm = gate is not None, grad_y is not None
    B, T, C = like.shape
    per_token = (gate if has_gate else scale).shape[1] == T
    inputs = (grad_h, grad_y, h, branch, gate, scale)
    flags = {"HAS_GRAD_H": grad_h is not None, "HAS_GATE": has_gate, "HAS_NORM": has_norm}
    run, tables = _prepared("adaln_backward", like, inputs, per_token, lengths, flags)
    sums, count = 0 if per_token else has_gate + 2 * has_norm, len(tables.chunks)
    workspace = like.new_empty(B * count * sums * C, dtype=torch.float32)
    run((*inputs, mean, rstd, dx, dbranch, dgate, dshift, dscale, workspace))
    if sums:
        rows = dgate if has_gate else dshift
        add = _prepare_sum(rows.shape, rows.dtype, rows.device, count, has_gate, has_norm)
        add((workspace, dgate, dshift, dscale, tables.spans))
