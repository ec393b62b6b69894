"""What the Triton backends share on the host: when they serve, alignment of strides.

Nothing here imports triton: `import ard_kernels` stays light, and works where triton is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ard_kernels.common.dtypes import FLOAT64_REFUSED
from ard_kernels.common.gpu_support import CPU, refuses_device

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, that is at the first use of a backend; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


class LazyModule(types.ModuleType):
    """A module that is imported when an attribute of it is first read."""

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(vars(module))  # the next one is found at once: that takes 4 us less
        return getattr(module, attribute)


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why no Triton kernel can run on this device and dtype; None when one can."""
    if not INSTALLED:
        return "triton is not installed"
    if dtype == torch.float64:
        return FLOAT64_REFUSED
    if device == CPU:
        return None if INTERPRETING else "on the CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return refuses_device(device)


def strides(*layouts: tuple[torch.Size, tuple[int, ...]]) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides but the last, in units of `unit` elements) of (shape, strides) each; unit is 8 when all allow it.

    Triton only learns whether an argument is a multiple of 16. The stride of a token is C or 3C or D elements, often a
    multiple of 8 alone (D = 72, say), and 8 halves make one 16-byte access: multiplying by the constant tells it.
    """
    values = [
        [stride if size > 1 else 0 for size, stride in zip(shape[:-1], own[:-1], strict=True)] for shape, own in layouts
    ]
    unit = 8 if all(stride % 8 == 0 for each in values for stride in each) else 1
    return unit, [tuple(stride // unit for stride in each) for each in values]


class Launch:
    """A kernel and all it is launched with but tensors and a few ints, for calls of one shape.

    Skips Triton's look-up of the compiled kernel, most of a launch's time on the host. What Triton specialises on is
    bound here, but for the alignment of the tensors, which is looked at in every call; ints that are passed in a call
    stand in the kernel's do_not_specialize.

    Args:
        kernel: parameters in the order: tensors, `bound`, ints of a call, constants.
        grid: programs.
        bound: tables, strides, sizes.
        constants: constexpr parameters and options (num_warps, ...) by name.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], bound: tuple, constants: dict[str, Any]):
        self.kernel, self.grid, self.bound, self.constants = kernel, (*grid, 1, 1)[:3], bound, constants
        self.runs: dict[tuple[bool, ...], Callable] = {}  # by which tensors start on 16 bytes
        self.rest = () if INTERPRETING else tuple(constants[n] for n in kernel.arg_names if n in constants)

    def __call__(self, tensors: Sequence[torch.Tensor | None], ints: tuple[int, ...] = ()) -> None:
        aligned = tuple([x is None or x.data_ptr() % 16 == 0 for x in tensors])
        run = self.runs.get(aligned)
        if run is not None:
            run(*tensors, *self.bound, *ints, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.bound, *ints, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            self.runs[aligned] = compiled[self.grid]
