"""Raw calls of ops: seen while a function runs, read from a record, made again on other tensors of the same layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ard_kernels.common import triton_support
from ard_kernels.common.record import line_of
from ard_kernels.history_attention.splits import workspace_elements


@dataclass(frozen=True)
class Call:
    """A call of one raw op. line: that of a record (ard_kernels/common/record.py); inputs: as it describes them."""

    line: str
    op: str = field(compare=False)
    inputs: dict[str, Any] = field(compare=False)

    @classmethod
    def of(cls, line: str) -> Call:
        """ValueError for a line that is no call of an op of this version of the library."""
        try:
            content = json.loads(line)
            op, inputs = content["op"], content["inputs"]
            names = [argument.name for argument in getattr(torch.ops.ard, op).default._schema.arguments[:-1]]
            call = cls(line, op, dict(zip(names, inputs, strict=True)))
            call.make(torch.device("meta"), fill=False)
            if call.dtype.is_floating_point:
                return call
            raise TypeError(f"{call.dtype} comes first")
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StopIteration) as error:
            expected = "a call that ARD_RECORD_SHAPES has written, with this version of ard_kernels"
            raise ValueError(f"got {line[:80]!r}; expected {expected}") from error

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        return {name: x for name, x in self.inputs.items() if isinstance(x, dict) and "shape" in x}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, by which the kernels' constants are looked up."""
        return getattr(torch, next(iter(self.tensors.values()))["dtype"])

    @property
    def label(self) -> str:
        """The op, its first tensor, what is short of its mask, lengths and norm."""
        name, first = next(iter(self.tensors.items()))
        short = {n: x for n, x in self.inputs.items() if isinstance(x, (str, list)) and len(str(x)) < 30}
        settings = [f"{n}={x}" for n, x in short.items()]
        return " ".join([f"{self.op} {name}={tuple(first['shape'])} {first['dtype']}", *settings])

    def make(self, device: torch.device, fill: bool = True) -> dict[str, Any]:
        """Inputs by name, tensors of integers on the host. fill: drawn, the same in every call; else whatever is there.

        What a backward takes from its forward, lse and out, is that of the inputs: of others scores would overflow.
        """
        draw = torch.Generator(device).manual_seed(0) if fill else None
        made = {name: _made(x, device, draw) for name, x in self.inputs.items()}
        if "workspace" in made:  # as large as this device needs, wherever the call was recorded
            elements = workspace_elements(made["keys"].shape[-1], device)
            made["workspace"] = torch.empty(elements, dtype=torch.float32, device=device)
        if fill and "lse" in made:
            forward = getattr(torch.ops.ard, self.op.removesuffix("_backward")).default
            results = forward(*(made[a.name] for a in forward._schema.arguments[:-1]), "torch")
            for name, result in zip(("out", "lse"), results, strict=True):
                made[name].copy_(result)
        return made

    def run(self, made: dict[str, Any]) -> list[Tensor]:
        """The op's results, empty ones left out, on backend triton; integers are as they were in every call."""
        inputs = [x.clone() if isinstance(x, Tensor) and not x.is_floating_point() else x for x in made.values()]
        with torch.no_grad():
            results = getattr(torch.ops.ard, self.op)(*inputs, "triton")
        results = results if isinstance(results, tuple) else (results,)
        return [x for x in results if x is not None and x.numel()]


def _made(described: Any, device: torch.device, draw: torch.Generator | None) -> Any:
    if not isinstance(described, dict):
        return described
    dtype = getattr(torch, described["dtype"])
    if "shape" not in described:
        return dtype
    shape, strides = described["shape"], described["strides"]
    if "values" in described:
        x = torch.zeros(shape, dtype=dtype)
        x[: len(described["values"])] = torch.tensor(described["values"], dtype=dtype)
        return x
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if all(shape) else 0
    memory = torch.empty(extent, dtype=dtype, device=device)
    return (memory if draw is None else memory.normal_(generator=draw)).as_strided(shape, strides)


def calls_of(run: Callable[[], object]) -> list[Call]:
    """The different raw calls that `run` makes, in its order, with those of its backward passes."""
    lines: dict[str, None] = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func.namespace == "ard":
                lines.setdefault(line_of(func.name().removeprefix("ard::"), args))
            return func(*args, **(kwargs or {}))

    with Seen():
        run()
    return [Call.of(line) for line in lines]


def read_calls(path: Path) -> list[Call]:
    """The different calls of a record.

    Raises:
        ValueError: a line that is no call, with its number; none at all.
    """
    calls: dict[Call, None] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            calls.setdefault(Call.of(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not calls:
        raise ValueError(f"{path}: got an empty file; expected what a program with ARD_RECORD_SHAPES has recorded")
    return list(calls)


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside, the Triton backends take CPU tensors, of which they launch nothing: to see what a call asks for."""
    with (
        mock.patch.object(triton_support, "INTERPRETING", True),
        mock.patch.object(triton_support.Launch, "__call__", lambda *arguments: None),
    ):
        yield
