"""What the Triton backends share on the host: when they serve, alignment of strides, constant tables on the device.

Nothing here imports triton: `import ard_kernels` stays light, and works where triton is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, that is at the first use of a backend; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


class LazyModule(types.ModuleType):
    """A module that is imported when an attribute of it is first read."""

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.__name__), attribute)


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run on this device and dtype; None when one can."""
    if not INSTALLED:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 is served by the torch backend only"
    if device.type == "cpu":
        return None if INTERPRETING else "on the CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip:
        return "its kernels are written for NVIDIA GPUs"
    major, minor = _capability(device.index or 0)
    return None if major >= 8 else f"it needs compute capability 8.0 or newer; this GPU has {major}.{minor}"


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> int:
    """Compute capability as 80, 90, ...; in the interpreter 90."""
    major, minor = _capability(device.index or 0) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def on_device(launch: Callable) -> Callable:
    """Run `launch` with its tensors' GPU as the current one: Triton launches on that, whatever the tensors' is."""

    @wraps(launch)
    def guarded(*args):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*args)
        return launch(*args)

    return guarded


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 4 in the interpreter, so that small tests take the paths of a GPU that is not full."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def strides(*tensors: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, the tensors' strides but the last, in units of `unit` elements); unit is 8 when all of them allow it.

    Triton only learns whether an argument is a multiple of 16. The stride of a token is C or 3C or D elements, often a
    multiple of 8 alone (D = 72, say), and 8 halves make one 16-byte access: multiplying by the constant tells it.
    """
    values = [
        [stride if size > 1 else 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)] for x in tensors
    ]
    unit = 8 if all(stride % 8 == 0 for each in values for stride in each) else 1
    return unit, [tuple(stride // unit for stride in each) for each in values]


def upload(array, device: torch.device) -> torch.Tensor:
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


def keep_if_captured(tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tables; kept for good once a CUDA graph has their addresses, whatever the cache they come from does."""
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(tables)] = tables
    return tables
