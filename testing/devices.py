"""Where a test runs: on the CPU, and on the GPU where there is one.

Within a process Triton either compiles for a GPU or interprets on the CPU. So a process that sees a GPU runs the GPU
backends there and "cpu" and "torch" on the CPU; what the interpreter and the emulator run follows in a process of its
own (tests/test_without_gpu.py), for which ARD_TEST_DEVICES=cpu hides the GPU.
"""

from __future__ import annotations

import os

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


def on_devices(*backends: str) -> list:
    """(backend, device) of every pair that this process can run, as parameters named triton-on-cuda and so on."""
    pairs = [(backend, device) for device in DEVICES for backend in backends if _serves(backend, device)]
    return [pytest.param(*pair, id="-on-".join(pair), marks=_marks(pair[1])) for pair in pairs]


def devices() -> list:
    """Parameters of the fixture `device`."""
    return [pytest.param(device, marks=_marks(device)) for device in DEVICES]


def _serves(backend: str, device: str) -> bool:
    if device == "cuda":
        return backend != "cpu"
    return SIMULATED or backend not in GPU_BACKENDS


def _marks(device: str) -> list:
    return [pytest.mark.gpu] if device == "cuda" else []
