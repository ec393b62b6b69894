"""What the GPU backends, Triton and CUDA C++, share on the host: the device at hand, constant tables on it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

CPU = torch.device("cpu")  # comparing with it takes a third of what asking for device.type takes


@cache
def refuses_device(device: torch.device) -> str | None:
    """Why no GPU kernel of ours can run on this device; None when one can."""
    if device.type != "cuda" or torch.version.hip:
        return "its kernels are written for NVIDIA GPUs"
    major, minor = _capability(device.index or 0)
    return None if major >= 8 else f"it needs compute capability 8.0 or newer; this GPU has {major}.{minor}"


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> int:
    """Compute capability as 80, 90, ...; on the CPU, where kernels are interpreted or emulated, 90."""
    major, minor = (9, 0) if device == CPU else _capability(device.index or 0)
    return 10 * major + minor


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a thread block may have (CUDA programming guide, compute capabilities)."""
    arch = architecture(device)
    kilobytes = 99 if arch in (86, 89) or arch >= 120 else 163 if arch < 90 else 227
    return kilobytes << 10


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Tables = TypeVar("_Tables", bound="tuple[torch.Tensor, ...]")


def on_device(launch: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Run `launch` with its tensors' GPU as the current one: kernels are launched on the current one.

    Its first argument is a tensor, or None and the second is one.
    """

    @wraps(launch)
    def guarded(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        x: Any = args[0] if args[0] is not None else args[1]
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return launch(*args, **kwargs)
        return launch(*args, **kwargs)

    return guarded


_assumed_multiprocessors: int | None = None


def assume_multiprocessors(count: int | None) -> int | None:
    """Let `multiprocessors` answer `count` (None: the truth); returns what was assumed before. For tuning.override."""
    global _assumed_multiprocessors
    before, _assumed_multiprocessors = _assumed_multiprocessors, count
    multiprocessors.cache_clear()
    return before


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 4 on the CPU, so that small tests take the paths of a GPU that is not full."""
    if _assumed_multiprocessors is not None:
        return _assumed_multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def upload(array: np.ndarray | list[int], device: torch.device) -> torch.Tensor:
    """An int32 table on `device`, for the caller to cache.

    On a GPU another thread makes it, on a stream of its own: so it lives outside the memory pool of a CUDA graph that
    is being warmed up in this thread, whose memory is not ours to keep.

    Raises:
        RuntimeError: a CUDA graph is being captured; no memory may be allocated for the table then.
    """
    table = torch.as_tensor(array, dtype=torch.int32, device="cpu")
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ard_kernels: a shape or mask is new in a CUDA graph capture; call the op with it once before"
        )

    def copy() -> torch.Tensor:
        stream = _upload_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            result = table.to(device)
        stream.synchronize()
        return result

    return _uploader().submit(copy).result()


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """High priority: streams of that kind come from a pool of their own, so it is never one that captures a graph."""
    return torch.cuda.Stream(device, priority=-1)


@cache
def _uploader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="ard-kernels-upload")


_captured: dict[int, tuple[torch.Tensor, ...]] = {}


def keep_if_captured(tables: _Tables) -> _Tables:
    """The tables; kept for good once a CUDA graph has their addresses, whatever the cache they come from does."""
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(tables)] = tables
    return tables
