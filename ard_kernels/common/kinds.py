"""Checks made once for each kind of call: of the smallest ones they took as long as the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from ard_kernels.common.library import private

_PLAIN = (Tensor, Parameter)
_VALUES = frozenset((int, float, str, bool, type(None)))  # what a key can hold: no tensor, whose value may change
_MOST_KEPT = 1024
_jit_trace = private("_C._get_tracing_state")  # sizes are tensors then

_results: dict[tuple, Any] = {}


def once_per_kind(check: Callable[..., Any], tensors: Sequence[Any], *settings: Any) -> Any:
    """check(*tensors, *settings), which depends on shapes, strides, dtypes, devices and values, and is not None."""
    kind = _kind_of(check, tensors, settings)
    if kind is None:
        return check(*tensors, *settings)
    result = _results.get(kind)
    if result is None:
        result = check(*tensors, *settings)
        if len(_results) >= _MOST_KEPT:
            _results.clear()
        _results[kind] = result
    return result


def _kind_of(check: Callable[..., Any], tensors: Sequence[Any], settings: Sequence[Any]) -> tuple | None:
    """None for what no key describes: lengths in a list, subclasses of Tensor, what a compiler traces."""
    types = tuple(map(type, settings))
    if is_compiling() or _jit_trace is None or _jit_trace() is not None or not _VALUES.issuperset(types):
        return None
    fields = [check, types, settings]  # 1, 1.0 and True are one key without their types
    for x in tensors:
        if type(x) not in _PLAIN:
            return None
        try:
            fields += (x.shape, x.stride(), x.dtype, x.device)
        except RuntimeError:  # no dense tensor
            return None
    return tuple(fields)
