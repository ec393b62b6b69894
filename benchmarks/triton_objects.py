"""What Triton's assembler and the text of a kernel say of it, as cuda_objects.py does for nvcc."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout

from triton import knobs


def _keep_report(backend=None, stages: dict[str, Callable] | None = None, *_):
    """What ptxas says of a kernel becomes part of its metadata, and so of Triton's cache."""
    if stages is None:  # asked for what tells such kernels apart in the cache
        return "ptxas report", "ptxas report"
    assemble = stages["cubin"]

    def assemble_and_keep(ptx: str, metadata: dict) -> bytes:
        with redirect_stdout(io.StringIO()) as said:
            cubin = assemble(ptx, metadata)
        metadata["ptxas"] = said.getvalue()
        return cubin

    stages["cubin"] = assemble_and_keep


def keep_reports() -> None:
    """Every kernel compiled in this process from now on has `metadata.ptxas`."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.runtime.add_stages_inspection_hook = _keep_report


def ptxas_report(text: str) -> tuple[int, int, bool]:
    """(registers, bytes spilled, wgmma serialised)."""
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return int(re.search(r"Used (\d+) registers", text)[1]), spilled, "serialized" in text


def tensor_core_flops(ptx: str, warps: int) -> int:
    """FLOPs of all matrix instructions in the text, each executed once by every warp (wgmma: warpgroup)."""
    flops = 0
    for m, n, k in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx):
        flops += 2 * int(m) * int(n) * int(k) * warps // 4
    for m, n, k in re.findall(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx):
        flops += 2 * int(m) * int(n) * int(k) * warps
    return flops


def tcgen05_flops(ttgir: str) -> int:
    """FLOPs of the tcgen05 matmuls in the loop's body, once per thread block; PTX has their shapes in registers only.

    The pipelined loop leaves copies before and after itself, for its first and last tiles: those are not counted.
    """
    body = ttgir[ttgir.index("scf.for") : ttgir.rindex("scf.yield")]
    shapes = re.findall(r"tc_gen5_mma .*? : !ttg\.memdesc<(\d+)x(\d+)x\w+, .*?>, !ttg\.memdesc<\d+x(\d+)x", body)
    return sum(2 * int(m) * int(k) * int(n) for m, k, n in shapes)
