"""The compiled module `ard_kernels._C`, or why it is not here. torch loads first, so that both share one OpenMP."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

module: ModuleType | None
missing: str | None
try:
    module, missing = import_module("ard_kernels._C"), None
except ImportError as error:
    module, missing = None, f"the compiled extension ard_kernels._C did not load: {error}"


def refuses_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot serve these tensors; None when they can."""
    if device.type != "cpu":
        return f"tensors are on {device.type}; the cpu backend reads host memory"
    if dtype == torch.float64:
        return "float64 is served by the torch backend only"
    return missing
