"""What gelu is checked with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ard_kernels.common.self_check import Draw, Trial, Unit
from ard_kernels.gelu.op import OP, gelu_op


def trials(draw: Draw, dtype: torch.dtype, width: int) -> Iterator[Trial]:
    """Far into both tails."""
    yield Trial("a matrix", {"x": 4 * draw(37, 129, dtype=dtype)}, lambda backend, x: {"y": gelu_op(x, backend)})


UNIT = Unit(OP, trials, (0,))
