"""Which backend runs an op: argument > `use_backend` > environment `ARD_BACKEND` > best available.

Every op registers the backends it has, each with a function that says why it cannot serve a device, dtype and width
(or None when it can).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ard_kernels.common import self_check, tuning
from ard_kernels.common.gpu_support import architecture
from ard_kernels.common.library import forward_mode

BACKENDS = ("cuda", "triton", "cpu", "torch", "flash")

# (device, dtype, width): width is the head dim or the channels, None when it is not known yet
Refusal = Callable[[torch.device, torch.dtype, "int | None"], "str | None"]


class BackendStatus(NamedTuple):
    """Whether a backend serves an op on a device, and why not; or which widths it has failed a self-check at."""

    available: bool
    reason: str


_refusals: dict[str, dict[str, Refusal]] = {}
# What `use_backend` blocks have asked for, in the order they were entered. The last one holds. A plain global, not a
# ContextVar: Dynamo guards on it, so a compiled caller follows `use_backend` too.
_requests: list[list[str]] = []
_override: str | None = None
_environment: str | None = os.environ.get("ARD_BACKEND") or None


def serves_everything(device: torch.device, dtype: torch.dtype, width: int | None = None) -> None:
    """The refusal of a backend that has none: compositions of PyTorch ops."""


def register_backend(op: str, backend: str, refuses: Refusal) -> None:
    """Declare that `op` has an implementation named `backend`; `refuses(device, dtype, width)` says why not."""
    _refusals.setdefault(op, {})[backend] = refuses


def has_backend(op: str, backend: str) -> bool:
    """Whether this build has an implementation of `op` named `backend`, for whatever device."""
    return backend in _refusals[op]


def refusal(op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why `backend` cannot run `op` on such tensors; None when it can."""
    if backend not in BACKENDS:
        return f"unknown backend; expected one of {', '.join(BACKENDS)}"
    if not has_backend(op, backend):
        return f"{op} has no {backend} implementation in this build"
    reason = _refusals[op][backend](device, dtype, width)
    return self_check.objection(op, backend, device, dtype, width, named=True) if reason is None else reason


def automatic_order(op: str, device: torch.device, dtype: torch.dtype, width: int | None) -> tuple[str, ...]:
    """The backends that may be chosen without being named, the preferred first.

    Never emulated or interpreted kernels; cuda and flash only where committed results show them correct and fastest.
    """
    if device.type != "cuda":
        return ("cpu", "torch")
    fastest = tuning.fastest(op, architecture(device), dtype, width)
    return tuple(dict.fromkeys((fastest, "triton", "torch")))


def check_backend(op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """ValueError unless `backend`, as an op takes it, serves such tensors."""
    reason = refusal(op, backend, device, dtype, width)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run on {device.type} {dtype}: {reason}")


def requested() -> str | None:
    """The backend that is asked for where no argument names one."""
    return _override or _environment


def resolve(op: str, argument: str | None, device: torch.device, dtype: torch.dtype, width: int | None) -> str:
    """`choose` by what is asked for now."""
    return choose(op, argument, requested(), device, dtype, width)


def choose(
    op: str, argument: str | None, request: str | None, device: torch.device, dtype: torch.dtype, width: int | None,
    slow: str | None = None,
) -> str:  # fmt: skip
    """Name of the backend to run. An explicit choice that cannot serve raises; nothing falls back silently.

    request: what `requested` gave. slow: a backend that is chosen where no other serves, as it has been measured slower
    for this call.
    """
    explicit = argument or request
    if explicit is None:
        if forward_mode() and has_backend(op, "torch"):  # the one with derivatives in forward mode: see library.py
            return "torch"
        order = automatic_order(op, device, dtype, width)
        for backend in [*(b for b in order if b != slow), *(b for b in order if b == slow)]:
            if backend not in _refusals[op] or _refusals[op][backend](device, dtype, width) is not None:
                continue
            if self_check.objection(op, backend, device, dtype, width) is None:
                return backend
        raise RuntimeError(f"{op}: no backend serves {device.type} tensors of {dtype}; see ard_kernels.backends()")
    reason = refusal(op, explicit, device, dtype, width)
    if reason is not None:
        source = "argument backend" if argument else "use_backend" if _override else "environment ARD_BACKEND"
        raise ValueError(f"{op}: backend {explicit!r} ({source}) cannot run on {device.type} {dtype}: {reason}")
    return explicit


def backends(
    device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, BackendStatus]]:
    """For each op, each backend's status on `device` (default: CUDA when present, else CPU) for `dtype`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    table: dict[str, dict[str, BackendStatus]] = {}
    for op in sorted(_refusals):
        table[op] = {}
        for name in BACKENDS:
            reason = refusal(op, name, device, dtype)
            failed = self_check.failures(op, name, device, dtype).values()
            table[op][name] = BackendStatus(reason is None, reason or "; ".join(failed))
    return table


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend `name`; process-wide, nests, restored on exit.

    Raises:
        ValueError: unknown name now; an op that `name` cannot serve raises when it is called.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name is {name!r}; expected one of {', '.join(BACKENDS)}")
    request = [name]  # a list, to be found again by identity: blocks of two threads may end in any order
    _requests.append(request)
    _override = name
    try:
        yield
    finally:
        _requests[:] = [other for other in _requests if other is not request]
        _override = _requests[-1][0] if _requests else None
