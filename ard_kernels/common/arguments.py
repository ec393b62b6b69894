"""Checks of arguments that all ops share. A message says op, argument, expected and got; nothing is written before."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

LARGEST = torch.finfo(torch.float64).max
NORM_EPS = 1e-6  # default of every norm, added to the variance: DiT's (arXiv 2212.09748)


def described(value: object) -> str:
    """`value` for an error message: its repr, but a tensor by dtype and shape, and nothing long."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def check_tensor(op: str, name: str, x: object) -> None:
    """ValueError unless x is a dense tensor: what has strides and a data pointer."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{op}: {name} is {described(x)}; expected a tensor")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise ValueError(f"{op}: {name} is a {kind} tensor; expected a dense one (torch.strided)")


def is_int(value: object) -> bool:
    """Whether value is an integer of Python, NumPy or the compiler; a bool is none."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def check_int(op: str, name: str, value: Any, least: int, unit: str = "") -> int:
    """`value` as an int, or a ValueError unless it is an integer >= least."""
    if not is_int(value) or value < least:
        suffix = f" ({unit})" if unit else ""
        raise ValueError(f"{op}: {name} is {described(value)}; expected an int >= {least}{suffix}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[return-value]  # acts as one


def check_number(op: str, name: str, value: Any, expected: str = "a finite number") -> float:
    """`value` as a float, or a ValueError unless it is a finite number; a tensor of one element counts as one."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(
            f"{op}: {name} is a tensor that requires a gradient, and none flows to it; expected {expected}"
        )
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST:  # so is a NaN; math.isfinite does not trace
        raise ValueError(f"{op}: {name} is {described(value)}; expected {expected}")
    return float(value)


def check_scale(op: str, scale: object, head_dim: int) -> float:
    """The softmax scale: 1 / sqrt(head_dim) for None."""
    return 1 / math.sqrt(head_dim) if scale is None else check_number(op, "scale", scale)
