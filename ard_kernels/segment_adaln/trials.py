"""What the adaLN family is checked with: ragged segments and rows per token, both norms, rows in fp32 and in x's dtype,
every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.common.self_check import Draw, Tensors, Trial, Unit
from ard_kernels.segment_adaln.op import adaln_op

LENGTHS = (40, 1, 33, 22)
ROWS = ("gate", "shift", "scale")
PER_TOKEN = "rows per token"


def _call(
    backend: str, x: Tensor, branch: Tensor | None = None, gate: Tensor | None = None, shift: Tensor | None = None,
    scale: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *, norm: str | None,
    lengths: tuple[int, ...],
) -> Tensors:  # fmt: skip
    """h and y, of those that there are."""
    results = adaln_op(x, branch, gate, shift, scale, weight, bias, list(lengths), norm, NORM_EPS, x.dtype, backend)[:2]
    return {name: result for name, result in zip("hy", results, strict=True) if result is not None}


def trials(
    draw: Draw, dtype: torch.dtype, channels: int, calls: tuple[tuple[str, tuple[str, ...], str | None], ...]
) -> Iterator[Trial]:
    """calls: label, inputs besides x, norm."""
    for label, names, norm in calls:
        lengths, S = ((1,), sum(LENGTHS)) if PER_TOKEN in label else (LENGTHS, len(LENGTHS))
        rows = draw(2, S, 3 * channels, dtype=dtype if norm == "rms" else torch.float32).chunk(3, 2)
        named = {
            "x": draw(2, sum(LENGTHS), channels, dtype=dtype),
            "branch": draw(2, sum(LENGTHS), channels, dtype=dtype),
        }
        named |= dict(zip(ROWS, rows, strict=True)) | {"weight": draw(channels), "bias": draw(channels)}
        inputs = {name: named[name] for name in ("x", *names)}
        yield Trial(label, inputs, partial(_call, norm=norm, lengths=lengths))


# For each function: what it is called with besides x, and the norm.
CALLS = {
    "adaln_modulate": (
        ("LayerNorm", ("shift", "scale"), "layer"),
        ("RMSNorm with a weight, scale alone", ("scale", "weight"), "rms"),
        (f"LayerNorm, {PER_TOKEN}", ("shift", "scale"), "layer"),
    ),
    "gate_residual_adaln": (
        ("LayerNorm", ("branch", "gate", "shift", "scale"), "layer"),
        ("LayerNorm with weight and bias, no rows", ("branch", "gate", "weight", "bias"), "layer"),
        ("RMSNorm, no gate", ("branch", "shift", "scale"), "rms"),
        (f"LayerNorm, {PER_TOKEN}", ("branch", "gate", "shift", "scale"), "layer"),
    ),
    "gate_residual": (("gated", ("branch", "gate"), None), (f"gated, {PER_TOKEN}", ("branch", "gate"), None)),
}
UNITS = tuple(Unit(op, partial(trials, calls=calls), (1152, 1536)) for op, calls in CALLS.items())
