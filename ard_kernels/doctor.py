"""`python -m ard_kernels.doctor`: versions, devices, and each op's backends with the reason when one is refused."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy
import torch

import ard_kernels
from ard_kernels.block_causal_attention import flash
from ard_kernels.common import extension
from ard_kernels.common.backends import CHIPS, VERIFIED_ON_HARDWARE, has_backend


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _verified(op: str, backend: str) -> str:
    """Where `backend` of `op` has passed on hardware, chip by chip."""
    known = VERIFIED_ON_HARDWARE.get((op, backend), {})
    missing = [chip for chip in CHIPS[backend] if chip not in known]
    parts = [f"{chip} verified on {known[chip]}" for chip in CHIPS[backend] if chip in known]
    return "; ".join(parts + [f"{', '.join(missing)} not yet verified on hardware"] * bool(missing))


def report() -> str:
    """The whole diagnosis as text."""
    lines = [
        f"ard-kernels {ard_kernels.__version__}  Python {platform.python_version()}  {platform.machine()}",
        f"torch {torch.__version__}  numpy {numpy.__version__}  triton {_version('triton')}",
        f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    if extension.module is None:
        lines.append(f"extension: {extension.missing}")
    else:
        lines.append(f"extension: ard_kernels._C, row kernels compiled for and running {extension.module.cpu_isa()}")
        has_cuda = hasattr(extension.module, "gpu")
        lines.append(
            f"CUDA C++ kernels: {'built in' if has_cuda else 'not in this build (no nvcc, or ARD_BUILD_CUDA=0)'}"
        )
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        properties = torch.cuda.get_device_properties(0)
        lines.append(f"GPU: {properties.name}, sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}")
    else:
        lines.append("GPU: none visible to torch")
    packages = [kind.described() for kind in flash.PACKAGES if kind.installed()]
    lines.append(f"flash-attn: {', '.join(packages) or 'not installed'}")
    for device in devices:
        lines.append(f"\nbackends on {device} (choice: see `ard_kernels.common.backends.automatic_order`):")
        for op, table in ard_kernels.backends(device).items():
            lines.append(f"  {op}")
            for name, status in table.items():
                said = "available" if status.available else f"refused: {status.reason}"
                if name == "flash" and status.available:
                    said += f", by {flash.dense(torch.device(device), 64).described()}"
                lines.append(f"    {name:<7}{said}")
    lines.append("\nGPU kernels:")
    for op in ard_kernels.backends("cpu"):
        for name in ("cuda", "triton"):
            if has_backend(op, name):
                lines.append(f"  {op} {name}: {_verified(op, name)}")
    return "\n".join(lines)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
