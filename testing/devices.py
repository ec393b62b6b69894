"""Where a test runs: on the CPU, and on the GPU where there is one.

Within a process Triton either compiles for a GPU or interprets on the CPU. So a process that sees a GPU runs the GPU
backends there and "cpu" and "torch" on the CPU; what the interpreter and the emulator run follows in a process of its
own (tests/test_without_gpu.py), for which ARD_TEST_DEVICES=cpu hides the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

GPU_BACKENDS = ("triton", "cuda")


def _devices() -> tuple[str, ...]:
    wanted = os.environ.get("ARD_TEST_DEVICES")
    if wanted not in (None, "cpu", "cuda"):
        raise ValueError(f"ARD_TEST_DEVICES is {wanted!r}; expected cpu or cuda")
    if wanted:
        return (wanted,)
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


DEVICES = _devices()
# Without a GPU its kernels run on CPU tensors: Triton's in its interpreter, CUDA C++ in testing/emulator.
SIMULATED = DEVICES == ("cpu",)


def on_devices(*backends: str, **values: Sequence) -> list:
    """(backend, device) of every pair that this process can run, as parameters named triton-on-cuda and so on.

    Backends given as keywords come with values, on_devices(torch=[(16, torch.float32)]) as (backend, device, 16,
    torch.float32): for dtypes and sizes that not every backend takes.
    """
    wanted = {backend: [()] for backend in backends}
    wanted |= {backend: [v if isinstance(v, tuple) else (v,) for v in each] for backend, each in values.items()}
    return [
        pytest.param(backend, device, *value, id="-".join([f"{backend}-on-{device}", *map(_name, value)]), marks=marks)
        for device in DEVICES
        for marks in (_marks(device),)
        for backend, each in wanted.items()
        if _serves(backend, device)
        for value in each
    ]


def _simulated(mark: pytest.MarkDecorator) -> Callable[[list], list]:
    """(parameters of `on_devices`) -> the same ones, where simulated backends have this mark too."""

    def marked(parameters: list) -> list:
        marks = [mark] if SIMULATED else []
        return [
            pytest.param(*p.values, id=p.id, marks=[*p.marks, *(marks if p.values[0] in GPU_BACKENDS else [])])
            for p in parameters
        ]

    return marked


# For what PyTorch does around a kernel: of its schema and fake the slow tests tell; for compilers the backend is a
# constant like any other, so that those of torch and cpu tell enough.
simulated_slow = _simulated(pytest.mark.slow)
simulated_exhaustive = _simulated(pytest.mark.exhaustive)


def devices() -> list:
    """Parameters of the fixture `device`."""
    return [pytest.param(device, marks=_marks(device)) for device in DEVICES]


def _serves(backend: str, device: str) -> bool:
    if device == "cuda":
        return backend != "cpu"
    return SIMULATED or backend not in GPU_BACKENDS


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _marks(device: str) -> list:
    return [pytest.mark.gpu] if device == "cuda" else []
