"""The op families: folders of one name in ard_kernels, csrc, tests and benchmarks. Imports nothing heavy."""

from pathlib import Path

ROOMS = tuple(sorted(path.parent.name for path in Path(__file__).parents[1].glob("ard_kernels/*/op.py")))
# Those with kernels for GPUs.
GPU_ROOMS = tuple(
    room for room in ROOMS if (Path(__file__).parents[1] / "ard_kernels" / room / "triton_impl.py").exists()
)
