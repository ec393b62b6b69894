"""Plans made once for each kind of call: checks and the choice of a backend took as long as the smallest kernels.

What a plan may depend on is in its key: shapes, strides, dtypes, devices and `requires_grad` of tensors, the values of
settings, autocast, whether gradients are recorded, which backend is asked for, and what is known of backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from ard_kernels.common import backends, self_check
from ard_kernels.common.autocast import autocast_dtype
from ard_kernels.common.library import forward_mode, private

_PLAIN = (Tensor, Parameter)


class _Lengths(tuple[int, ...]):
    """Those of segments in a list or tuple of ints."""

    __slots__ = ()


_VALUES = frozenset((int, float, str, bool, _Lengths, type(None)))  # what a key can hold: no tensor, it may change
_MOST_KEPT = 1024
_jit_trace = private("_C._get_tracing_state")  # sizes are tensors then

_plans: dict[tuple, Any] = {}


def once_per_kind(make: Callable[..., Any], tensors: Sequence[Any], *settings: Any) -> Any:
    """make(*tensors, *settings, request), which is not None; request: what backend is asked for, read once, as another
    thread may change it. The first tensor tells the device; others may be None."""
    request = backends.requested()
    kind = _kind_of(make, tensors, settings, request)
    if kind is None:
        return make(*tensors, *settings, request)
    plan = _plans.get(kind)
    if plan is None:
        plan = make(*tensors, *settings, request)
        if self_check.lasting(tensors[0].device):
            if len(_plans) >= _MOST_KEPT:
                _plans.clear()
            _plans[kind] = plan
    return plan


def _kind_of(
    make: Callable[..., Any], tensors: Sequence[Any], settings: Sequence[Any], request: str | None
) -> tuple | None:
    """None for what no key describes: lengths in a tensor, subclasses of Tensor, tangents, what a compiler traces."""
    if is_compiling() or _jit_trace is None or _jit_trace() is not None or forward_mode():
        return None
    types = tuple(map(type, settings))
    if not _VALUES.issuperset(types):
        settings = tuple([_Lengths(x) if _are_lengths(x) else x for x in settings])
        types = tuple(map(type, settings))
    if not _VALUES.issuperset(types) or tensors[0] is None:
        return None
    fields = [make, types, settings]  # 1, 1.0 and True are one key without their types
    fields += (request, self_check.epoch, torch.is_grad_enabled())
    for x in tensors:
        if x is None:
            fields.append(None)
            continue
        if type(x) not in _PLAIN:
            return None
        try:
            fields += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        except RuntimeError:  # no dense tensor
            return None
    fields.append(autocast_dtype(tensors[0].device))
    return tuple(fields)


def _are_lengths(value: Any) -> bool:
    return type(value) in (list, tuple) and all([type(n) is int for n in value])
