"""Which machine this is, as records of it are named, and the folder that keeps what is found out about it."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from ard_kernels.common.library import private

PACKAGE = Path(__file__).parents[1]


def cache_folder() -> Path:
    """$ARD_CACHE_DIR, default ~/.cache/ard_kernels, and where nobody has a home a temporary one. It need not exist."""
    if given := os.environ.get("ARD_CACHE_DIR"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "ard_kernels"
    except RuntimeError:  # a container's user that is a number, without HOME
        return Path(tempfile.gettempdir(), f"ard_kernels-{os.getuid()}")


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


@cache
def chip(device: torch.device) -> str:
    """The processor behind `device`, by its maker's name; of a CPU with the instructions that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """Name of the CPU; where nothing says it, of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@cache
def driver(device: torch.device) -> str:
    """Version of the GPU's driver, or of CUDA as it knows it; "" on a CPU."""
    if device.type != "cuda":
        return ""
    try:
        found = re.search(r"Kernel Module\D+([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:  # WSL
        found = None
    ask = private("_C._cuda_getDriverVersion")
    return found[1] if found else f"cuda{ask()}" if ask else "unknown"


def version(*distributions: str) -> str:
    """Of the first of these packages that is installed; "" where none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return ""


def triton_version() -> str:
    """ "" where it is not installed."""
    return version("triton", "pytorch-triton")
