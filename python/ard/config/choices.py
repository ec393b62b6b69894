"""What a setting may be, where it is one of a few, and what that means: named here once, for recipes and for code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch

from ard_kernels.common.arguments import described

PRECISIONS = ("fp32", "bf16")
STRATEGIES = ("ddp", "fsdp")
STATE_KINDS = ("x0", "ode")  # the teacher's x0-predictions, or the states of its ODE
DTYPES = {"float32": torch.float32, "float16": torch.float16}  # of stored states
SOLVERS = ("ddim", "euler", "heun", "midpoint")
TIMES = ("even", "kept")  # of the student's segments


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Contexts in which a forward runs: "bf16" is autocast over float32 weights, "fp32" none."""
    require_one_of("", {"precision": (precision, PRECISIONS)})
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def require_one_of(section: str, known: Mapping[str, tuple[Any, Sequence[Any]]]) -> None:
    """Raises ValueError naming the first setting (name -> value, choices) that is none of its choices."""
    for name, (value, choices) in known.items():
        if value not in choices:
            where = f"{section}.{name}" if section else name
            raise ValueError(f"{where} is {described(value)}; expected one of {', '.join(map(repr, choices))}")


def check_keep(keep: tuple[int, ...], sampling_steps: int) -> None:
    """Raises ValueError unless ``keep`` are strictly descending respaced indices."""
    descending = all(earlier > later for earlier, later in pairwise(keep))
    if not keep or not descending or keep[0] >= sampling_steps or keep[-1] < 0:
        raise ValueError(
            f"keep: got {described(keep)}; expected strictly descending indices in [0, sampling_steps={sampling_steps})"
        )
