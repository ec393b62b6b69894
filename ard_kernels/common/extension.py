"""The compiled module `ard_kernels._C`, or why it is not here. torch loads first, so that both share one OpenMP.

`_C.gpu` holds the CUDA kernels where they were built. `emulated` is the same module built for the host, where
testing/emulator runs the kernels' source thread by thread; it serves CPU tensors, on an explicit backend="cuda" only.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ard_kernels.common.dtypes import FLOAT64_REFUSED
from ard_kernels.common.gpu_support import CPU, refuses_device
from ard_kernels.common.library import private

module: Any  # None where it is missing
missing: str | None
try:
    module, missing = import_module("ard_kernels._C"), None
except ImportError as error:
    module, missing = None, f"the compiled extension ard_kernels._C did not load: {error}"

emulated: Any = None


def restrained_isa() -> str | None:
    """Of the C++ kernels, where PyTorch's variable ATEN_CPU_CAPABILITY keeps its own to some instructions."""
    if not os.environ.get("ATEN_CPU_CAPABILITY") or module is None:
        return None
    most = torch.backends.cpu.get_cpu_capability().lower()
    return next((isa for isa in module.cpu_isas() if most.startswith(isa)), "baseline")


if (_isa := restrained_isa()) is not None:
    module.use_cpu_isa(_isa)

_raw_stream = private("_C._cuda_getCurrentRawStream")  # what Triton asks: no Python object is made

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses_cpu(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why the C++ kernels cannot serve these tensors; None when they can."""
    if device != CPU:
        return f"tensors are on {device.type}; the cpu backend reads host memory"
    if dtype == torch.float64:
        return FLOAT64_REFUSED
    return missing


def refuses_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA C++ kernels cannot serve this device and dtype; None when some can."""
    if dtype == torch.float64:
        return FLOAT64_REFUSED
    if device == CPU:
        return None if emulated else "on the CPU it runs in the emulator of testing/emulator only"
    if module is None:
        return missing
    if not hasattr(module, "gpu"):
        return "this build of ard_kernels has no CUDA kernels (built without nvcc, or with ARD_BUILD_CUDA=0)"
    return refuses_device(device)


def gpu(device: torch.device) -> Any:
    """The module of CUDA kernels that serves tensors on `device`, which `refuses_cuda` did not refuse."""
    return emulated if device == CPU else module.gpu


def stream(device: torch.device) -> int:
    """The current stream of `device` as the launch functions take it."""
    if device == CPU:
        return 0
    return _raw_stream(device.index) if _raw_stream else torch.cuda.current_stream(device).cuda_stream


def pointer(x: Tensor | None) -> int:
    """Address of x's memory; 0 for None."""
    return 0 if x is None else x.data_ptr()


def view(x_BRC: Tensor | None) -> tuple[int, ...] | None:
    """What the extension takes as a (B, rows, C) tensor with a contiguous last dim; (C,) stands for each row."""
    if x_BRC is None:
        return None
    strides = x_BRC.stride()[:2] if x_BRC.dim() == 3 else (0, 0)
    return x_BRC.data_ptr(), *strides, _DTYPE_CODES[x_BRC.dtype]


def heads_view(x_BHTD: Tensor) -> tuple[int, ...]:
    """What the extension takes as a (B, H, T, D) tensor with a contiguous last dim."""
    batch, head, token, _ = x_BHTD.stride()
    return x_BHTD.data_ptr(), batch, head, token


def dtype_code(dtype: torch.dtype) -> int:
    """`DType` of csrc/common/tensor.h."""
    return _DTYPE_CODES[dtype]
