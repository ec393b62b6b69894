"""Global bytes a Triton kernel really reads and writes: every load and store of a run in the interpreter, counted.

Caches are not modelled: rows of shift and scale that a GPU would find in its L2 count each time they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from triton.runtime.interpreter import InterpreterBuilder

from ard_kernels.common import tuning
from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.segment_adaln import op as adaln


@dataclass
class Traffic:
    """Bytes of all unmasked elements."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the kernels launched inside read and write."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        traffic.read += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        traffic.written += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def adaln_over_minimum(
    takes: Sequence[str], arch: int, norm: str | None = "layer", B: int = 1, S: int = 1, L: int = 256, C: int = 1152
) -> dict[str, float]:
    """Bytes over the fewest possible, {"forward": ..., "backward": ...}, bf16 tokens and rows, fp32 parameters, shipped
    chunks, all gradients wanted; takes: names of the inputs, as in testing.plain.TAKES.

    The minimum touches each of x, branch, h, y (and their gradients), the rows, the parameters and the statistics once.
    """
    T, dtype = S * L, torch.bfloat16
    x, other = torch.randn(2, B, T, C).to(dtype).unbind(0)
    rows = torch.randn(B, S, 3 * C).to(dtype).chunk(3, -1)
    names = "branch", "gate", "shift", "scale", "weight", "bias"
    given = dict(zip(names, (other, *rows, *torch.randn(2, C)), strict=True))
    branch, gate, shift, scale, weight, bias = (given[name] if name in takes else None for name in given)
    shipped = {k: tuning.shipped(arch)[tuning.key(k, dtype, C, L)] for k in ("adaln_forward", "adaln_backward")}
    # A GPU of one multiprocessor is full: the chunks are the shipped ones.
    with tuning.override(shipped, multiprocessors=1):
        inputs = x, branch, gate, shift, scale, weight, bias
        with counted() as forward:
            h, y, mean, rstd = outputs = adaln.adaln_op(*inputs, [L], norm, NORM_EPS, dtype, "triton")
        saved = None if norm is None else x if h is None else h
        wanted = [row is not None for row in inputs[2:]]
        inputs_backward = h, y, saved, None if gate is None else branch, gate, scale, weight, bias, mean, rstd
        with counted() as backward:
            grads = adaln.backward_op(*inputs_backward, [L], None if shift is None else dtype, wanted, "triton")
    least_forward = sum(t.nbytes for t in (*inputs, *outputs) if t is not None)
    least_backward = sum(t.nbytes for t in (*inputs_backward, *grads) if t is not None)
    return {"forward": forward.total / least_forward, "backward": backward.total / least_backward}
