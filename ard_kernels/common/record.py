"""`ARD_RECORD_SHAPES=file`: every kind of raw call of a program, a line of JSON each, for `python -m ard_kernels.tune`.

A line is {"op": name, "inputs": [...]}: of a tensor its shape, strides and dtype, of one of integers what it holds too,
as the places of a cache decide what is launched; other inputs as they are, but for the last, the backend. Every op and
every backward is a raw op of plain arguments, so that is all it takes to repeat a call. Nothing else is written.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _opened(path: str) -> int:
    """A descriptor to append to the file; made when the library is imported, so that a bad path is heard of at once."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(f"ARD_RECORD_SHAPES is {path!r}; expected a file that can be written: {error}") from error


_path = os.environ.get("ARD_RECORD_SHAPES")
_file = _opened(_path) if _path else None
RECORDING = _file is not None
_recorded: set[str] = set()  # lines of this process
_local = threading.local()  # .silent: the calls of this thread are not the user's


def silence() -> None:
    """Record nothing more of this thread."""
    _local.silent = True


def line_of(op: str, inputs: Sequence[Any]) -> str:
    """The line of a raw call, whose last input is the backend."""
    return json.dumps({"op": op, "inputs": [_described(x) for x in inputs[:-1]]}, default=int)  # NumPy's integers


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        described: dict[str, Any] = {"shape": list(x.shape), "strides": list(x.stride()), "dtype": _name(x.dtype)}
        if not x.is_floating_point():  # without the zeros at its end, of which an empty cache has one per token
            described["values"] = np.trim_zeros(x.numpy(), "b").tolist()
        return described
    if isinstance(x, torch.dtype):
        return {"dtype": _name(x)}
    return list(x) if isinstance(x, (list, tuple)) else x


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def recorded(op: str, kernel: Callable, normal: Callable | None) -> Callable:
    """`kernel` that also records its calls, those that succeed. normal(*inputs): inputs of one of the same work."""

    def run(*inputs: Any) -> Any:
        if getattr(_local, "silent", False):
            return kernel(*inputs)
        line = line_of(op, inputs if normal is None else normal(*inputs))
        outputs = kernel(*inputs)
        if line not in _recorded and _file is not None:
            _recorded.add(line)
            os.write(_file, line.encode() + b"\n")  # one write: lines of several processes stay whole
        return outputs

    return run
