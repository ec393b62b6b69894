# mypy: allow-untyped-defs, disable-error-code=assignment, no-strict-optional
# (Inputs that a call lacks are None, in groups that their types do not know.)
"""The adaLN family in Triton: one pass over the tokens forward, one backward and a small sum of row gradients.

A program takes a chunk of tokens of one segment of one sample: the segment's gate, shift and scale are read once and
stay in registers while the tokens pass by, ROWS at a time. Backward, the row gradients of a chunk are summed in
registers, written once as fp32 partials, and added in chunk order by a second kernel: no atomics, so bit-equal results.
Rows per token are read, and their gradients written, with the token.

What a call lacks is None, which Triton knows at compile time. Of a segment the kernels need no more than two rows:

    factor = (1 + scale) * weight    moved = (1 + scale) * bias + shift    n = (h - mean) * rstd (an RMSNorm: mean = 0)
    y = n * factor + moved           g = dy * factor    dx = rstd * (g - mean(g) - n * mean(g * n)) + dh (no mean(g))
    shifts = sum dy    scales = sum dy * n    dgate = sum dx * branch    dbranch = gate * dx       the rest: spec.py
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
from ard_kernels.segment_adaln.triton_sums import Layout, add_up, dtypes, layout

# Arguments of which Triton shall not compile one variant that are multiples of 16 and one that are not.
SIZES = ["T", "chunk_count"]
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
def _plus_one(blocks):
    sums = ()
    for i in tl.static_range(len(blocks)):
        sums = sums + (1.0 + blocks[i],)
    return sums


@triton.jit
def _parameter(pointer, C: tl.constexpr, PARTS: tl.constexpr):
    """weight or bias as one fp32 row."""
    return widen_rows(load_rows(pointer + tl.zeros([1], tl.int32), tl.full([1], True, tl.int1), C, PARTS))


@triton.jit
def _factor(scale, weight, stride, batch, at, here, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """(1 + scale) * weight of rows `at`."""
    factor = _plus_one(zero_rows(1, PARTS))
    if scale is not None:
        factor = _plus_one(_load(scale, stride, batch, at, here, C, PARTS, UNIT))
    if weight is not None:
        factor = multiply_rows(factor, _parameter(weight, C, PARTS))
    return factor


@triton.jit
def _moved(
    shift, scale, bias, shift_stride, scale_stride, batch, at, here,
    C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(1 + scale) * bias + shift of rows `at`."""
    moved = zero_rows(1, PARTS)
    if shift is not None:
        moved = _load(shift, shift_stride, batch, at, here, C, PARTS, UNIT)
    if bias is not None:
        moved = add_rows(moved, _factor(scale, bias, scale_stride, batch, at, here, C, PARTS, UNIT))
    return moved


@triton.jit
def _modulate(n, rstd, factor, moved):
    """n * rstd * factor + moved."""
    blocks = ()
    for i in tl.static_range(len(n)):
        blocks = blocks + (n[i] * rstd[:, None] * factor[i] + moved[i],)
    return blocks


@triton.jit
def _chunk(table, chunk_count):
    """(sample, segment, first and stop token) of this program's chunk."""
    entry = table + tl.program_id(0) % chunk_count * 3
    return tl.program_id(0) // chunk_count, tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, branch, gate, shift, scale, weight, bias, h, y, mean, rstd, table, x_stride, branch_stride, gate_stride,
    shift_stride, scale_stride, h_stride, y_stride, T, chunk_count, eps,
    C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """h, y, mean and rstd of one chunk, those that there are."""
    batch, segment, start, stop = _chunk(table, chunk_count)
    one = segment + tl.arange(0, 1)
    if gate is not None and not PER_TOKEN:
        gate_row = _load(gate, gate_stride, batch, one, one >= 0, C, PARTS, UNIT)
    if y is not None and not PER_TOKEN:
        moved = _moved(shift, scale, bias, shift_stride, scale_stride, batch, one, one >= 0, C, PARTS, UNIT)
        factor = _factor(scale, weight, scale_stride, batch, one, one >= 0, C, PARTS, UNIT)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        here = tokens < stop
        rows = _load(x, x_stride, batch, tokens, here, C, PARTS, UNIT)
        if branch is not None:
            if gate is not None:
                gate_here = _load(gate, gate_stride, batch, tokens, here, C, PARTS, UNIT) if PER_TOKEN else gate_row
            branch_rows = _load(branch, branch_stride, batch, tokens, here, C, PARTS, UNIT)
            if gate is not None:
                branch_rows = multiply_rows(gate_here, branch_rows)
            rows = _round(add_rows(rows, branch_rows), h)
            _store(h, h_stride, batch, tokens, rows, here, C, PARTS, UNIT)
        if y is not None:
            if PER_TOKEN:
                moved = _moved(shift, scale, bias, shift_stride, scale_stride, batch, tokens, here, C, PARTS, UNIT)
                factor = _factor(scale, weight, scale_stride, batch, tokens, here, C, PARTS, UNIT)
            if mean is not None:
                means = row_sums(rows) / C
                rows = _centre(rows, means, C, PARTS)
            rstds = tl.rsqrt(row_sums(multiply_rows(rows, rows)) / C + eps)
            _store(y, y_stride, batch, tokens, _modulate(rows, rstds, factor, moved), here, C, PARTS, UNIT)
            statistics = batch.to(tl.int64) * T + tokens
            if mean is not None:
                tl.store(mean + statistics, means, mask=here)
            tl.store(rstd + statistics, rstds, mask=here)


@triton.jit
def _norm_gradient(dy, n, factor, rstd, C: tl.constexpr, RMS: tl.constexpr):
    """dx of y = n * factor through the statistics."""
    g = multiply_rows(dy, factor)
    mean_g = tl.zeros_like(rstd) if RMS else row_sums(g) / C
    mean_gn = row_sums(multiply_rows(g, n)) / C
    dx = ()
    for i in tl.static_range(len(dy)):
        dx = dx + (rstd[:, None] * (g[i] - mean_g[:, None] - n[i] * mean_gn[:, None]),)
    return dx


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad_h, grad_y, h, branch, gate, scale, weight, bias, mean, rstd, dx, dbranch, dgate, dshift, dscale, workspace,
    table, grad_h_stride, grad_y_stride, h_stride, branch_stride, gate_stride, scale_stride, dx_stride, dbranch_stride,
    dgate_stride, dshift_stride, dscale_stride, T, chunk_count,
    C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, PER_TOKEN: tl.constexpr, GATE_SUM: tl.constexpr,
    NORM_SUMS: tl.constexpr, KEEP_ROWS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dbranch of one chunk, those that there are; its sums, or with rows per token their gradients."""
    batch, segment, start, stop = _chunk(table, chunk_count)
    one = segment + tl.arange(0, 1)
    if gate is not None and KEEP_ROWS:
        gate_row = _load(gate, gate_stride, batch, one, one >= 0, C, PARTS, UNIT)
    if grad_y is not None and KEEP_ROWS:
        factor_row = _factor(scale, weight, scale_stride, batch, one, one >= 0, C, PARTS, UNIT)
    gate_sum = zero_rows(ROWS, PARTS)
    shift_sum, scale_sum = zero_rows(ROWS, PARTS), zero_rows(ROWS, PARTS)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        here = tokens < stop
        at, end = (tokens, stop) if PER_TOKEN else (one, segment + 1)  # rows read with every token
        gradient = zero_rows(ROWS, PARTS)
        if grad_h is not None:
            gradient = _load(grad_h, grad_h_stride, batch, tokens, here, C, PARTS, UNIT)
        if grad_y is not None:
            dy = _load(grad_y, grad_y_stride, batch, tokens, here, C, PARTS, UNIT)
            n = _load(h, h_stride, batch, tokens, here, C, PARTS, UNIT)
            statistics = batch.to(tl.int64) * T + tokens
            if mean is not None:
                n = _centre(n, tl.load(mean + statistics, mask=here, other=0.0), C, PARTS)
            rstds = tl.load(rstd + statistics, mask=here, other=0.0)
            n = scale_rows(n, rstds[:, None])
            factor = (
                factor_row if KEEP_ROWS else _factor(scale, weight, scale_stride, batch, at, at < end, C, PARTS, UNIT)
            )
            gradient = add_rows(gradient, _norm_gradient(dy, n, factor, rstds, C, mean is None))
            _store(dx, dx_stride, batch, tokens, gradient, here, C, PARTS, UNIT)
            dy_n = multiply_rows(dy, n)
            if PER_TOKEN and dshift is not None:
                _store(dshift, dshift_stride, batch, tokens, dy, here, C, PARTS, UNIT)
            if PER_TOKEN and dscale is not None:
                own = dy_n if weight is None else multiply_rows(dy_n, _parameter(weight, C, PARTS))
                own = own if bias is None else add_rows(own, multiply_rows(dy, _parameter(bias, C, PARTS)))
                _store(dscale, dscale_stride, batch, tokens, own, here, C, PARTS, UNIT)
            if NORM_SUMS:
                if PER_TOKEN:  # of dweight and dbias
                    plus = _factor(scale, None, scale_stride, batch, at, at < end, C, PARTS, UNIT)
                    dy, dy_n = multiply_rows(plus, dy), multiply_rows(plus, dy_n)
                shift_sum, scale_sum = add_rows(shift_sum, dy), add_rows(scale_sum, dy_n)
        if branch is not None:
            gate_here = gate_row if KEEP_ROWS else _load(gate, gate_stride, batch, at, at < end, C, PARTS, UNIT)
            branch_rows = _load(branch, branch_stride, batch, tokens, here, C, PARTS, UNIT)
            _store(dbranch, dbranch_stride, batch, tokens, multiply_rows(gate_here, gradient), here, C, PARTS, UNIT)
            gate_gradient = multiply_rows(gradient, branch_rows)
            if PER_TOKEN and dgate is not None:
                _store(dgate, dgate_stride, batch, tokens, gate_gradient, here, C, PARTS, UNIT)
            if GATE_SUM:
                gate_sum = add_rows(gate_sum, gate_gradient)
    # (B, chunks, 1 to 3, C): dgate, shifts, scales
    partials = workspace + (tl.program_id(0).to(tl.int64) + tl.arange(0, 1)) * ((GATE_SUM + 2 * NORM_SUMS) * C)
    if GATE_SUM:
        store_rows(partials, sum_rows(gate_sum), one >= 0, C, PARTS)
    if NORM_SUMS:
        store_rows(partials + GATE_SUM * C, sum_rows(shift_sum), one >= 0, C, PARTS)
        store_rows(partials + (GATE_SUM + 1) * C, sum_rows(scale_sum), one >= 0, C, PARTS)


KERNELS = {"adaln_forward": _forward, "adaln_backward": _backward}


@lru_cache(maxsize=1024)
def _prepare(
    name: str, shape_BTC: torch.Size, inputs: tuple[Layout | None, ...], others: tuple[torch.dtype | None, ...],
    device: torch.device, lengths: tuple[int, ...], few: int, eps: tuple[float, ...],
    flags: tuple[tuple[str, bool], ...], config: tuple[tuple[str, int], ...],
) -> tuple[Launch, Chunks]:  # fmt: skip
    """The launch of kernel `name` for inputs of these layouts (shape, strides, dtype; None: absent); its tables.

    others: dtypes of the other tensors, None: absent. few: multiprocessors. `eps`: (eps,) of the forward, () of the
    backward.
    """
    B, T, C = shape_BTC
    sizes, per_token = dict(config), lengths == (1,)
    tables = chunks((T,) if per_token else lengths, T, chunk_tokens(T, B, sizes.pop("TOKENS"), few), device)
    S = T if per_token else len(tables.spans)
    plain, rows = (shape_BTC, (T * C, C, 1)), ((B, S, C), (S * C, C, 1))
    outputs = (plain, plain) if name == "adaln_forward" else (plain, plain, rows, rows, rows)
    # The strides of an absent tensor are never used.
    unit, each = strides(*(plain if given is None else given[:2] for given in inputs), *outputs)
    constants = (
        sizes | dict(flags) | {"C": C, "PARTS": split_width(C, least=8, most=3), "UNIT": unit, "PER_TOKEN": per_token}
    )
    if name == "adaln_backward":  # see KEPT_WIDTH
        constants["KEEP_ROWS"] = not per_token and C <= KEPT_WIDTH
    count = len(tables.chunks)
    return Launch(KERNELS[name], (B * count,), (tables.chunks, *each, T, count, *eps), constants), tables


def _prepared(
    name: str, like: Tensor, inputs: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...],
    lengths: Sequence[int], flags: tuple[tuple[str, bool], ...] = (), eps: tuple[float, ...] = (),
) -> tuple[Launch, Chunks]:  # fmt: skip
    """`_prepare` of kernel `name` for these inputs; `like` is (B, T, C)."""
    shape, device = like.shape, like.device
    config = tuning.lookup(name, device, like.dtype, shape[2])
    run, tables = _prepare(
        name, shape, tuple([layout(x) for x in inputs]), dtypes(*others), device, tuple(lengths),
        multiprocessors(device), eps, flags, tuple(config.items()),
    )  # fmt: skip
    return run, keep_if_captured(tables)


@on_device
def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, h: Tensor | None, y: Tensor | None, mean: Tensor | None,
    rstd: Tensor | None, lengths: Sequence[int], eps: float,
) -> None:  # fmt: skip
    """See backend.py."""
    inputs, others = (x, branch, gate, shift, scale), (weight, bias, h, y, mean, rstd)
    run, _ = _prepared("adaln_forward", x, inputs, others, lengths, eps=(eps,))
    run((*inputs, *others))


@on_device
def backward(
    grad_h: Tensor | None, grad_y: Tensor | None, h: Tensor | None, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    dx: Tensor | None, dbranch: Tensor | None, dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, lengths: Sequence[int],
) -> None:  # fmt: skip
    """See backend.py."""
    like = h if h is not None else grad_h
    B, _, C = like.shape
    per_token, of_parameters = list(lengths) == [1], dweight is not None or dbias is not None
    of_rows = not per_token and (dshift is not None or dscale is not None)
    flags = ("GATE_SUM", not per_token and dgate is not None), ("NORM_SUMS", of_parameters or of_rows)
    inputs = grad_h, grad_y, h, branch, gate, scale
    others = weight, bias, mean, rstd, dx, dbranch, dgate, dshift, dscale
    run, tables = _prepared("adaln_backward", like, inputs, others, lengths, flags)
    count, sums = len(tables.chunks), flags[0][1] + 2 * flags[1][1]
    workspace = like.new_empty(B * count * sums * C, dtype=torch.float32)
    run((*inputs, *others, workspace))
    grads, parameters = (dgate, dshift, dscale, dweight, dbias), (scale, weight, bias)
    add_up(workspace, grads, parameters, (B, count, C), None if per_token else tables.spans, flags)
