"""Autocast, said once: which dtype a region of torch.autocast asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the enclosing autocast region for `device`; None outside of one."""
    if not is_compiling() and _any_autocast is not None and not _any_autocast():  # a device's name alone takes 0.4 us
        return None
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def dtype_in_autocast(x: torch.Tensor) -> torch.dtype:
    """The dtype that `cast_to_autocast` brings x to."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype


def cast_to_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the autocast dtype (fp64 stays, as in PyTorch's own rules); unchanged outside of autocast."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(dtype) for x in tensors)


def without_autocast(run: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """`run` with autocast off for the device of its first tensor: ops have cast already, and fp32 inside means fp32."""

    @wraps(run)
    def wrapped(*inputs: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        kind = next(x for x in inputs if isinstance(x, torch.Tensor)).device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return run(*inputs, **kwargs)
        with torch.autocast(kind, enabled=False):
            return run(*inputs, **kwargs)

    return wrapped
