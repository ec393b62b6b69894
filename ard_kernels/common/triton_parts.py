# mypy: allow-untyped-defs, disable-error-code=assignment
"""Rows whose width is not a power of two, as a tuple of power-of-two parts: 72 = 64 + 8 (16 lanes), 1152 = 1024 + 128.

Triton's blocks have power-of-two sides; padding 72 to 128 would waste 44 % of every matmul and every load. A row is
held as one block per part instead. The Python side (`split_width`) chooses the parts; the device side loops over them
at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ard_kernels.common.triton_support import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


def split_width(width: int, least: int, most: int) -> tuple[int, ...]:
    """At most `most` powers of two, falling, each >= `least`, that cover `width` with the least padding."""
    parts: list[int] = []
    rest = -(-width // least) * least
    while rest > 0:
        power = 1 << (rest.bit_length() - 1)
        if power != rest and len(parts) == most - 1:
            power *= 2
        parts.append(power)
        rest -= power
    merged = max(triton.next_power_of_2(width), least)
    return tuple(parts) if sum(parts) < merged else (merged,)


@triton.constexpr_function
def part_width(PARTS, i):
    return PARTS[i]


@triton.constexpr_function
def part_start(PARTS, i):
    return sum(PARTS[:i])


@triton.jit
def load_part(pointers, rows_mask, WIDTH: tl.constexpr, START: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr):
    """Columns START .. START + PART of rows that start at `pointers` (R,); 0 where masked or past WIDTH."""
    columns = START + tl.arange(0, PART)
    addresses = pointers[:, None] + columns[None, :]
    if START + PART <= WIDTH:
        if MASKED:
            return tl.load(addresses, mask=rows_mask[:, None], other=0.0)
        else:
            return tl.load(addresses)
    elif MASKED:
        return tl.load(addresses, mask=rows_mask[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(addresses, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_rows(pointers, rows_mask, WIDTH: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr = True):
    """The rows as a tuple of (R, part) blocks."""
    blocks = ()
    for i in tl.static_range(len(PARTS)):
        blocks = blocks + (load_part(pointers, rows_mask, WIDTH, part_start(PARTS, i), part_width(PARTS, i), MASKED),)
    return blocks


@triton.jit
def store_rows(pointers, blocks, rows_mask, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Write a tuple of (R, part) blocks, cast to the pointers' dtype."""
    for i in tl.static_range(len(PARTS)):
        columns = part_start(PARTS, i) + tl.arange(0, part_width(PARTS, i))
        mask = rows_mask[:, None] & (columns < WIDTH)[None, :]
        tl.store(pointers[:, None] + columns[None, :], blocks[i].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """fp32 accumulators."""
    blocks = ()
    for i in tl.static_range(len(PARTS)):
        blocks = blocks + (tl.zeros([ROWS, part_width(PARTS, i)], tl.float32),)
    return blocks


@triton.jit
def scale_rows(blocks, factor):
    """blocks * factor, factor (R,) or a scalar block that broadcasts."""
    scaled = ()
    for i in tl.static_range(len(blocks)):
        scaled = scaled + (blocks[i] * factor,)
    return scaled


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + A @ B in fp32."""
    if _INTERPRETING:  # its matmul takes the bits of bfloat16 for integers (Triton 3.7); through fp32 it is exact
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision=PRECISION)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """A @ B^T summed over the parts: (M, width) x (N, width) -> (M, N), fp32."""
    total = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        total = _dot(a[i], tl.trans(b[i]), total, PRECISION)
    return total


@triton.jit
def add_dot(p, b, accumulators, PRECISION: tl.constexpr):
    """accumulators + P @ B, part by part: (M, N) x (N, width) -> (M, width), fp32."""
    sums = ()
    for i in tl.static_range(len(b)):
        sums = sums + (_dot(p, b[i], accumulators[i], PRECISION),)
    return sums


@triton.jit
def add_rows(a, b):
    """a + b."""
    sums = ()
    for i in tl.static_range(len(a)):
        sums = sums + (a[i] + b[i],)
    return sums


@triton.jit
def multiply_rows(a, b):
    """a * b, where rows of height 1 broadcast."""
    products = ()
    for i in tl.static_range(len(a)):
        products = products + (a[i] * b[i],)
    return products


@triton.jit
def widen_rows(blocks):
    """In fp32."""
    wide = ()
    for i in tl.static_range(len(blocks)):
        wide = wide + (blocks[i].to(tl.float32),)
    return wide


@triton.jit
def row_sums(blocks):
    """(R,): each row's sum over all parts.

    A single row's is added up as scalars, which have no layout: to add (1,) blocks, Triton brings the parts to one
    layout first, the widest through shared memory.
    """
    if blocks[0].shape[0] == 1:
        total = tl.sum(tl.sum(blocks[0], 1), 0)
        for i in tl.static_range(1, len(blocks)):
            total += tl.sum(tl.sum(blocks[i], 1), 0)
        return tl.full([1], 0.0, tl.float32) + total
    else:
        totals = tl.sum(blocks[0], 1)
        for i in tl.static_range(1, len(blocks)):
            totals += tl.sum(blocks[i], 1)
        return totals


@triton.jit
def sum_rows(blocks):
    """The sum of all rows, height 1."""
    sums = ()
    for i in tl.static_range(len(blocks)):
        sums = sums + (tl.sum(blocks[i], 0, keep_dims=True),)
    return sums
