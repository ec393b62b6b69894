# mypy: allow-untyped-defs, disable-error-code=assignment
"""qk_norm_rope in Triton: one pass over the tokens forward, one backward and a small sum of parameters' gradients.

A program takes a run of tokens, one at a time, as a block whose rows are the token's heads: statistics are sums over a
row, or over the whole block. A row is a tuple of blocks: the first elements of its pairs, the second ones, and what is
past 2 P; pairs side by side are parted in registers. Weight and bias stay in registers, and so do the sums of their
gradients, which each program writes once, and a second kernel adds up in order: no atomics, so bit-equal results.

    n = (x - mean) * rstd    z = n * weight + bias    y_a = z_a cos - z_b sin, y_b = z_b cos + z_a sin
    dz = dy turned back, g = dz * weight    dx = rstd * (g - mean(g) - n * mean(g * n)), mean(g) of a LayerNorm alone
    dweight = sum dz * n    dbias = sum dz
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import multiprocessors, on_device
from ard_kernels.common.triton_parts import (
    add_rows,
    load_part,
    multiply_rows,
    part_start,
    part_width,
    row_sums,
    scale_rows,
    split_width,
    sum_rows,
)
from ard_kernels.common.triton_support import Launch, strides
from ard_kernels.qk_norm_rope.spec import Rule

# Arguments of which Triton shall not compile one variant that are multiples of 16 and one that are not.
SIZES = ["T", "tokens", "programs", "table_rows"]


@triton.jit
def _load(rows, here, D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """fp32 rows of D elements that start at `rows`, as (firsts of pairs ..., seconds ..., elements past 2 P ...)."""
    firsts, seconds, rest = (), (), ()
    for i in tl.static_range(len(PAIRS)):
        if HALF:
            first = load_part(rows, here, P, part_start(PAIRS, i), part_width(PAIRS, i), MASKED)
            second = load_part(rows + P, here, P, part_start(PAIRS, i), part_width(PAIRS, i), MASKED)
        else:
            both = load_part(rows, here, 2 * P, 2 * part_start(PAIRS, i), 2 * part_width(PAIRS, i), MASKED)
            first, second = tl.split(tl.reshape(both, (both.shape[0], part_width(PAIRS, i), 2)))
        firsts = firsts + (first.to(tl.float32),)
        seconds = seconds + (second.to(tl.float32),)
    for i in tl.static_range(len(REST)):
        block = load_part(rows + 2 * P, here, D - 2 * P, part_start(REST, i), part_width(REST, i), MASKED)
        rest = rest + (block.to(tl.float32),)
    return firsts + seconds + rest


@triton.jit
def _store_part(rows, block, here, WIDTH: tl.constexpr, START: tl.constexpr, PART: tl.constexpr):
    columns = START + tl.arange(0, PART)
    mask = here[:, None] & (columns < WIDTH)[None, :]
    tl.store(rows[:, None] + columns[None, :], block.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _store(rows, blocks, here, D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
           HALF: tl.constexpr):  # fmt: skip
    """The inverse of `_load`."""
    COUNT: tl.constexpr = len(PAIRS)
    for i in tl.static_range(COUNT):
        first, second = blocks[i], blocks[COUNT + i]
        if HALF:
            _store_part(rows, first, here, P, part_start(PAIRS, i), part_width(PAIRS, i))
            _store_part(rows + P, second, here, P, part_start(PAIRS, i), part_width(PAIRS, i))
        else:
            both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * part_width(PAIRS, i)))
            _store_part(rows, both, here, 2 * P, 2 * part_start(PAIRS, i), 2 * part_width(PAIRS, i))
    for i in tl.static_range(len(REST)):
        block = blocks[2 * COUNT + i]
        _store_part(rows + 2 * P, block, here, D - 2 * P, part_start(REST, i), part_width(REST, i))


@triton.jit
def _turn(z, cos, sin, COUNT: tl.constexpr, BACK: tl.constexpr):
    """z with its pairs turned by the angle, or by its negative."""
    firsts, seconds, rest = (), (), ()
    for i in tl.static_range(COUNT):
        if BACK:
            firsts = firsts + (z[i] * cos[i] + z[COUNT + i] * sin[i],)
            seconds = seconds + (z[COUNT + i] * cos[i] - z[i] * sin[i],)
        else:
            firsts = firsts + (z[i] * cos[i] - z[COUNT + i] * sin[i],)
            seconds = seconds + (z[COUNT + i] * cos[i] + z[i] * sin[i],)
    for i in tl.static_range(2 * COUNT, len(z)):
        rest = rest + (z[i],)
    return firsts + seconds + rest


@triton.jit
def _load_table(table, stride, batch, row, heads, here, P: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr):
    """A token's row of cos or sin, one for all heads or one for each."""
    start = table + batch.to(tl.int64) * stride[0] + row.to(tl.int64) * stride[1]
    rows = start + heads * stride[2] if PER_HEAD else start + tl.arange(0, 1)
    blocks = ()
    for i in tl.static_range(len(PAIRS)):
        block = load_part(rows, here, P, part_start(PAIRS, i), part_width(PAIRS, i), PER_HEAD)
        blocks = blocks + (block.to(tl.float32),)
    return blocks


@triton.jit
def _centre(blocks, mean, here, D: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    """blocks - mean, 0 where there is no element."""
    COUNT: tl.constexpr = len(PAIRS)
    centred = ()
    for i in tl.static_range(2 * COUNT):
        columns = part_start(PAIRS, i % COUNT) + tl.arange(0, part_width(PAIRS, i % COUNT))
        centred = centred + (tl.where(here[:, None] & (columns < P)[None, :], blocks[i] - mean[:, None], 0.0),)
    for i in tl.static_range(len(REST)):
        columns = part_start(REST, i) + tl.arange(0, part_width(REST, i))
        inside = here[:, None] & (columns < D - 2 * P)[None, :]
        centred = centred + (tl.where(inside, blocks[2 * COUNT + i] - mean[:, None], 0.0),)
    return centred


@triton.jit
def _mean(blocks, H: tl.constexpr, D: tl.constexpr, OVER_ALL: tl.constexpr):
    """(HEADS,) of each row, or (1,) of all."""
    sums = row_sums(blocks)
    if OVER_ALL:
        return tl.full([1], 0.0, tl.float32) + tl.sum(sums, 0) / (H * D)
    else:
        return sums / D


@triton.jit
def _place(n, T, stride, heads, UNIT: tl.constexpr):
    """Offsets of a token's heads; 64-bit."""
    batch, token = (n // T).to(tl.int64), (n % T).to(tl.int64)
    return (batch * stride[0] + token * stride[1] + heads.to(tl.int64) * stride[2]) * UNIT


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, y, weight, bias, cos, sin, mean, rstd, x_stride, y_stride, cos_stride, sin_stride, T, tokens, programs,
    table_rows, eps,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, UNIT: tl.constexpr, HAS_NORM: tl.constexpr, IS_LAYER: tl.constexpr, OVER_ALL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PER_HEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, mean and rstd of a run of tokens."""
    heads = tl.arange(0, HEADS)
    here = heads < H
    own = heads * D if OVER_ALL else tl.arange(0, 1)
    if HAS_WEIGHT:
        w = _load(weight + own, here, D, P, PAIRS, REST, HALF, OVER_ALL)
    if HAS_BIAS:
        b = _load(bias + own, here, D, P, PAIRS, REST, HALF, OVER_ALL)
    program = tl.program_id(0).to(tl.int64)
    start, stop = (program * tokens // programs).to(tl.int32), ((program + 1) * tokens // programs).to(tl.int32)
    for i in tl.range(0, stop - start, num_stages=STAGES):
        n = start + i
        z = _load(x + _place(n, T, x_stride, heads, UNIT), here, D, P, PAIRS, REST, HALF, HEADS != H)
        if HAS_NORM:
            place = n.to(tl.int64) + tl.arange(0, 1) if OVER_ALL else n.to(tl.int64) * H + heads
            known = place >= 0 if OVER_ALL else here
            if IS_LAYER:
                means = _mean(z, H, D, OVER_ALL)
                tl.store(mean + place, means, mask=known)
                z = _centre(z, means, here, D, P, PAIRS, REST)
            rstds = tl.rsqrt(_mean(multiply_rows(z, z), H, D, OVER_ALL) + eps)
            tl.store(rstd + place, rstds, mask=known)
            z = scale_rows(z, rstds[:, None])
        if HAS_WEIGHT:
            z = multiply_rows(z, w)
        if HAS_BIAS:
            z = add_rows(z, b)
        if P > 0:
            row = n % T % table_rows
            c = _load_table(cos, cos_stride, n // T, row, heads, here, P, PAIRS, PER_HEAD)
            s = _load_table(sin, sin_stride, n // T, row, heads, here, P, PAIRS, PER_HEAD)
            z = _turn(z, c, s, len(PAIRS), False)
        _store(y + _place(n, T, y_stride, heads, UNIT), z, here, D, P, PAIRS, REST, HALF)


@triton.jit
def _no_rows(HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    """Zeros in the form that `_load` gives."""
    pairs, rest = (), ()
    for i in tl.static_range(len(PAIRS)):
        pairs = pairs + (tl.zeros([HEADS, part_width(PAIRS, i)], tl.float32),)
    for i in tl.static_range(len(REST)):
        rest = rest + (tl.zeros([HEADS, part_width(REST, i)], tl.float32),)
    return pairs + pairs + rest


@triton.jit
def _norm_gradient(g, n, rstd, H: tl.constexpr, D: tl.constexpr, OVER_ALL: tl.constexpr, IS_LAYER: tl.constexpr):
    """dx of n through the statistics."""
    mean_gn = _mean(multiply_rows(g, n), H, D, OVER_ALL)
    dx = ()
    if IS_LAYER:
        mean_g = _mean(g, H, D, OVER_ALL)
        for i in tl.static_range(len(g)):
            dx = dx + (rstd[:, None] * (g[i] - mean_g[:, None] - n[i] * mean_gn[:, None]),)
    else:
        for i in tl.static_range(len(g)):
            dx = dx + (rstd[:, None] * (g[i] - n[i] * mean_gn[:, None]),)
    return dx


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad_y, x, weight, cos, sin, mean, rstd, dx, workspace, grad_y_stride, x_stride, dx_stride, cos_stride,
    sin_stride, T, tokens, programs, table_rows,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, UNIT: tl.constexpr, HAS_NORM: tl.constexpr, IS_LAYER: tl.constexpr, OVER_ALL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, WEIGHT_SUM: tl.constexpr, BIAS_SUM: tl.constexpr, PER_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a run of tokens, and their share of dweight and dbias."""
    heads = tl.arange(0, HEADS)
    here = heads < H
    own = heads * D if OVER_ALL else tl.arange(0, 1)
    if HAS_WEIGHT:
        w = _load(weight + own, here, D, P, PAIRS, REST, HALF, OVER_ALL)
    weight_sum, bias_sum = _no_rows(HEADS, PAIRS, REST), _no_rows(HEADS, PAIRS, REST)
    program = tl.program_id(0).to(tl.int64)
    start, stop = (program * tokens // programs).to(tl.int32), ((program + 1) * tokens // programs).to(tl.int32)
    for i in tl.range(0, stop - start, num_stages=STAGES):
        n = start + i
        dz = _load(grad_y + _place(n, T, grad_y_stride, heads, UNIT), here, D, P, PAIRS, REST, HALF, HEADS != H)
        if P > 0:
            row = n % T % table_rows
            c = _load_table(cos, cos_stride, n // T, row, heads, here, P, PAIRS, PER_HEAD)
            s = _load_table(sin, sin_stride, n // T, row, heads, here, P, PAIRS, PER_HEAD)
            dz = _turn(dz, c, s, len(PAIRS), True)
        if HAS_NORM:
            normed = _load(x + _place(n, T, x_stride, heads, UNIT), here, D, P, PAIRS, REST, HALF, HEADS != H)
            place = n.to(tl.int64) + tl.arange(0, 1) if OVER_ALL else n.to(tl.int64) * H + heads
            known = place >= 0 if OVER_ALL else here
            rstds = tl.load(rstd + place, mask=known, other=0.0)
            if IS_LAYER:
                normed = _centre(normed, tl.load(mean + place, mask=known, other=0.0), here, D, P, PAIRS, REST)
            normed = scale_rows(normed, rstds[:, None])
            if WEIGHT_SUM:
                weight_sum = add_rows(weight_sum, multiply_rows(dz, normed))
            if BIAS_SUM:
                bias_sum = add_rows(bias_sum, dz)
            g = multiply_rows(dz, w) if HAS_WEIGHT else dz
            dz = _norm_gradient(g, normed, rstds, H, D, OVER_ALL, IS_LAYER)
        _store(dx + _place(n, T, dx_stride, heads, UNIT), dz, here, D, P, PAIRS, REST, HALF)
    WIDTH: tl.constexpr = H * D if OVER_ALL else D
    to = workspace + program * ((WEIGHT_SUM + BIAS_SUM) * WIDTH) + own
    seen = here if OVER_ALL else tl.arange(0, 1) >= 0
    if WEIGHT_SUM:
        _store(to, weight_sum if OVER_ALL else sum_rows(weight_sum), seen, D, P, PAIRS, REST, HALF)
    if BIAS_SUM:
        _store(to + WEIGHT_SUM * WIDTH, bias_sum if OVER_ALL else sum_rows(bias_sum), seen, D, P, PAIRS, REST, HALF)


@triton.jit(do_not_specialize=["programs", "first"])
def _add_programs(
    workspace, out, programs, first, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """out (WIDTH,) = the sum of the programs' rows at workspace + first, BLOCK columns: ROWS sums, then those."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < WIDTH)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        address = workspace + first + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.load(address, mask=(rows < programs)[:, None] & inside, other=0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < WIDTH)


KERNELS = {"rope_forward": _forward, "rope_backward": _backward}
Layout = tuple[torch.Size, tuple[int, ...]]  # shape, strides


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else (x.shape, x.stride())


def _strides_of(layout: Layout) -> tuple[int, ...]:
    """Those of a table but the last, 0 of what broadcasts."""
    return tuple(step if size > 1 else 0 for size, step in zip(layout[0][:-1], layout[1][:-1], strict=True))


@lru_cache(maxsize=1024)
def _prepare(
    name: str, sections: tuple[Layout, ...], tables: tuple[Layout | None, ...], dtypes: tuple[torch.dtype | None, ...],
    device: torch.device, few: int, rule: Rule, flags: tuple[tuple[str, bool], ...],
    config: tuple[tuple[str, int], ...],
) -> tuple[Launch, int]:  # fmt: skip
    """The launch of kernel `name` for sections of these layouts, and its number of programs. few: multiprocessors."""
    (B, T, H, D), constants = sections[0][0], dict(config)
    programs = min(B * T, few * constants.pop("BLOCKS"))
    unit, each = strides(*sections)
    rows, P, per_head = 1, 0, False
    own: list[tuple[int, ...]] = [(0, 0, 0), (0, 0, 0)]
    if tables[0] is not None and tables[1] is not None:
        (_, rows, _, P), per_head = tables[0][0], tables[0][0][2] > 1
        own = [_strides_of(table) for table in (tables[0], tables[1])]
    constants |= dict(flags) | {
        "H": H, "D": D, "HEADS": triton.next_power_of_2(H), "P": P, "UNIT": unit, "HALF": rule.half,
        "PAIRS": split_width(P, least=4, most=3) if P else (),
        "REST": split_width(D - 2 * P, least=8, most=3) if D > 2 * P else (),
        "HAS_NORM": rule.norm != "none", "IS_LAYER": rule.norm == "layer", "OVER_ALL": rule.over_all,
        "PER_HEAD": per_head,
    }  # fmt: skip
    eps = (rule.eps,) if name == "rope_forward" else ()
    return Launch(KERNELS[name], (programs,), (*each, *own, T, B * T, programs, rows, *eps), constants), programs


def _prepared(
    name: str, sections: tuple[Tensor, ...], cos: Tensor | None, sin: Tensor | None, rule: Rule,
    parameters: dict[str, Tensor | None],
) -> tuple[Launch, int]:  # fmt: skip
    """`_prepare` for these tensors; parameters by the flag that says whether there is one."""
    x = sections[0]
    config = tuning.lookup(name, x.device, x.dtype, x.shape[2] * x.shape[3])
    dtypes = x.dtype, *(None if p is None else p.dtype for p in (cos, *parameters.values()))
    flags = tuple((flag, parameter is not None) for flag, parameter in parameters.items())
    layouts: Any = tuple([_layout(section) for section in sections])
    return _prepare(
        name, layouts, (_layout(cos), _layout(sin)), dtypes, x.device, multiprocessors(x.device), rule, flags,
        tuple(config.items()),
    )  # fmt: skip


@on_device
def forward(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    run, _ = _prepared("rope_forward", (x, y), cos, sin, rule, {"HAS_WEIGHT": weight, "HAS_BIAS": bias})
    run((x, y, weight, bias, cos, sin, mean, rstd))


@lru_cache(maxsize=1024)
def _prepare_sum(
    width: int, dtype: torch.dtype, device: torch.device, programs: int, first: int, stride: int
) -> Launch:
    """The launch that adds the programs' shares of one parameter up."""
    constants = {"WIDTH": width, "BLOCK": 32, "ROWS": 32, "num_warps": 4}
    return Launch(_add_programs, (triton.cdiv(width, 32),), (programs, first, stride), constants)


@on_device
def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    flags = {"HAS_WEIGHT": weight, "WEIGHT_SUM": dweight, "BIAS_SUM": dbias}
    run, programs = _prepared("rope_backward", (grad_y, x, dx), cos, sin, rule, flags)
    made = [grad for grad in (dweight, dbias) if grad is not None]
    stride = sum(grad.numel() for grad in made)
    workspace = x.new_empty(programs * stride, dtype=torch.float32)
    run((grad_y, x, weight, cos, sin, mean, rstd, dx, workspace))
    for place, grad in enumerate(made):
        add = _prepare_sum(grad.numel(), grad.dtype, grad.device, programs, place * grad.numel(), stride)
        add((workspace, grad))
