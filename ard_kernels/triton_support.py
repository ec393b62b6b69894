"""What the Triton backends share on the host: when they serve, alignment of strides.

Nothing here imports triton: `import ard_kernels` stays light, and works where triton is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types

import torch

from ard_kernels.gpu_support import refuses_device

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, that is at the first use of a backend; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


class LazyModule(types.ModuleType):
    """A module that is imported when an attribute of it is first read."""

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.__name__), attribute)


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why no Triton kernel can run on this device and dtype; None when one can."""
    if not INSTALLED:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 is served by the torch backend only"
    if device.type == "cpu":
        return None if INTERPRETING else "on the CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return refuses_device(device)


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
