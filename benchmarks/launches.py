"""What each launch of an op takes of a Hopper GPU: the compiled kernel's loops, times the tiles of the schedule.

A launch's amounts are sums over all its warps (`sass.Cost`), and bytes. The ways through a loop that are counted:

    full tile     of those with all matrix instructions and copies, the one with the fewest instructions
    masked tile   Triton's second loop; of a kernel with one loop for both, the way with the most instructions
    program       what is left of a way through the whole kernel: its first loads, its last stores

Where a pass of the loop is not a tile (dK, dV of the mma.sync kernel takes half of one), the passes of a tile follow
from the FLOPs of its products.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ard_kernels.block_causal_attention import triton_impl
from ard_kernels.block_causal_attention.cuda import HEAD_DIMS
from ard_kernels.block_causal_attention.spec import empty_output
from ard_kernels.block_causal_attention.tiles import column_tiles, heads_per_group, make_tables
from ard_kernels.common import tuning
from benchmarks import build_tables
from benchmarks.aot import FUNCTIONS, SHARED, THREADS, compiled_by
from benchmarks.chip import MULTIPROCESSORS, SHARED_BYTES
from benchmarks.cuda_objects import cuobjdump, launch_bounds, nvcc_cubin, short_names
from benchmarks.sass import COPIES, GLOBAL_STORES, TENSOR, Cost, Flow, Instruction, Loop, cost, disassemble, flops
from testing import waves
from testing.cases import Case

ARCHITECTURE = 90
SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "block_causal_attention"


class Products(NamedTuple):
    """One kernel of attention: matrix products of a tile; tensors (tokens, D) that it reads or writes of its rows and
    of its columns; fp32 statistics of a query that it reads or writes."""

    matmuls: int
    rows: int
    columns: int
    statistics: int
    by_key: bool = False


FORWARD = Products(2, rows=2, columns=2, statistics=1)
DQ = Products(3, rows=4, columns=2, statistics=2)
DKV = Products(4, rows=4, columns=2, statistics=2, by_key=True)
DK, DV = DKV._replace(matmuls=3, rows=3), DKV._replace(matmuls=2, rows=3)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. warps: those that compute; a producer warp beside them feeds a persistent block by TMA."""

    name: str
    flow: Flow
    registers: int
    threads: int
    shared_bytes: int
    block: tuple[int, int]
    products: Products

    @property
    def has_producer(self) -> bool:
        return any(instruction.operation == "UTMALDG" for block in self.flow.blocks for instruction in block)

    @property
    def warps(self) -> int:
        return self.threads // 32 - 4 * self.has_producer  # a producer takes a warpgroup, of which one thread works

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor."""
        fit = build_tables.blocks_per_sm(self.registers, self.threads, THREADS[ARCHITECTURE])
        return min(fit, SHARED[ARCHITECTURE][1] // (self.shared_bytes + 1024))


# Compiled kernels


def registers_of(cubin: Path) -> dict[str, int]:
    """Registers of a thread by mangled name."""
    text = cuobjdump("-res-usage", str(cubin))
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", text)}


def triton_binary(title: str, products: Products, launch: tuple[str, Any, dict[str, int]]) -> Binary:
    """Of one launch that `compiled_by` caught."""
    name, compiled, options = launch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (flow,), (registers,) = disassemble(path).values(), registers_of(path).values()
    block = options["BLOCK_M"], options["BLOCK_N"]
    return Binary(title, flow, registers, 32 * options["num_warps"], compiled.metadata.shared, block, products)


@cache
def triton_attention(
    kernel: str, lengths: tuple[int, ...], mask: str, op: str, heads: tuple[int, int], D: int,
    constants: tuple[tuple[str, int], ...] | None = None,
) -> Binary:  # fmt: skip
    """A Triton kernel as a call would compile it; `kernel`: attention_forward and the like."""
    case = Case(op, 1, lengths, H=heads[0], kv_heads=heads[1], D=D, mask=mask)
    length = lengths[0] if len(set(lengths)) == 1 else 0
    config = tuning.shipped(ARCHITECTURE)[tuning.key(kernel, case.dtype, D, length)] | dict(constants or ())
    q, k, v = (torch.empty(1, n, case.tokens, D, dtype=case.dtype) for n in (heads[0], heads[1], heads[1]))
    out, lse = empty_output(q), torch.empty(1, heads[0], case.tokens)

    def run() -> None:
        if kernel == "attention_forward":
            triton_impl.forward(q, k, v, out, lse, case.segments, 0.1)
        else:
            triton_impl.backward(out, None, q, k, v, out, lse, q, k, v, case.segments, 0.1)

    (launch,) = compiled_by(run, FUNCTIONS[kernel], ARCHITECTURE, config)
    title, products = {"forward": ("forward", FORWARD), "backward_dq": ("dQ", DQ), "backward_dkv": ("dK, dV", DKV)}[
        launch[0]
    ]
    return triton_binary(f"Triton {title}", products, launch)


def constant(header: str, name: str) -> int:
    """An integer constant of a header of the attention kernels."""
    found = re.search(rf"\b{name} = (\d+)", (SOURCES / header).read_text())
    if found is None:
        raise ValueError(f"launches: {header} has no constant {name}")
    return int(found[1])


# The bf16 kernels of sm80_backward.cu by their two flags, in order of their launches.
BACKWARD = {
    "": ("mma.sync dQ", DQ), "true, true": ("mma.sync dK, dV", DKV), "true, false": ("mma.sync dK", DK),
    "false, true": ("mma.sync dV", DV),
}  # fmt: skip


def cuda_kernels(source: str, D: int) -> Iterator[tuple[str, Flow, int, int]]:
    """(short name, flow, registers, threads) of the bf16 kernels of an attention source at one head dim."""
    path = nvcc_cubin(SOURCES / source, f"-DARD_HEAD_DIM={D}")
    registers, threads, flows = registers_of(path), launch_bounds(cuobjdump("-elf", str(path))), disassemble(path)
    names = [name for name in flows if name in threads]  # the others are functions that kernels call
    for name, short in zip(names, short_names(names), strict=True):
        if "bfloat16" in short:
            yield short, flows[name], registers[name], threads[name]


@cache
def cuda_attention(source: str, D: int) -> list[Binary]:
    """The kernels of sm90.cu (the forward) or sm80_backward.cu (two or three launches)."""
    header, prefix = ("sm90_layout.h", "kBlock") if source == "sm90.cu" else ("params.h", "kBackwardBlock")
    block = constant(header, f"{prefix}M"), constant(header, f"{prefix}N")
    found = []
    for short, flow, registers, threads in cuda_kernels(source, D):
        flags = re.search(r"(\w+, \w+)>$", short)[1] if "dkv" in short else ""
        title, products = ("wgmma forward", FORWARD) if source == "sm90.cu" else BACKWARD[flags]
        found.append(Binary(title, flow, registers, threads, 0, block, products))
    order = [title for title, _ in BACKWARD.values()]
    return sorted(found, key=lambda binary: order.index(binary.name) if binary.name in order else 0)


# Costs of a tile


def total(instructions: Iterable[Instruction]) -> Cost:
    return sum(map(cost, instructions), Cost())


def count_work(block: list[Instruction]) -> int:
    return sum(instruction.operation in (*TENSOR, *COPIES) for instruction in block)


def count_stores(block: list[Instruction]) -> int:
    return sum(instruction.operation in GLOBAL_STORES for instruction in block)


class TileCosts(NamedTuple):
    """Of all warps of a block."""

    full: Cost
    masked: Cost
    program: Cost
    flops: int  # issued of a full tile


def tile_costs(binary: Binary, D: int) -> TileCosts:
    """What a full tile, a masked one, and a program beside its tiles take."""
    flow, (rows, columns) = binary.flow, binary.block
    loops = flow.innermost(lambda instruction: instruction.operation in TENSOR)
    if not 1 <= len(loops) <= 2:
        raise ValueError(f"{binary.name}: {len(loops)} loops with matrix instructions; expected 1 or 2")
    stores = frozenset(number for number, block in enumerate(flow.blocks) if count_stores(block))

    def lean(loop: Loop) -> list[Instruction]:
        return flow.instructions(flow.path(lambda block: (count_work(block), -len(block)), loop, stores))

    def heavy(loop: Loop) -> list[Instruction]:
        return flow.instructions(flow.path(lambda block: (len(block),), loop, stores))

    wanted = 2 * rows * columns * D * binary.products.matmuls
    passes = round(wanted / (flops(lean(loops[0])) * binary.warps))
    if passes < 1:
        raise ValueError(f"{binary.name}: a pass of its loop has more FLOPs than a tile; expected a part or all of one")
    tile = flow.around(loops[0]) if passes > 1 else loops[0]
    if tile is None:
        raise ValueError(f"{binary.name}: {passes} passes of its loop are a tile; expected a loop around it")

    def of_tile(way) -> Cost:
        rest = total(way(loops[0])) * (passes - 1) if passes > 1 else Cost()
        return (total(way(tile)) + rest) * binary.warps

    full = of_tile(lean)
    masked = total(lean(loops[1])) * binary.warps if len(loops) == 2 else of_tile(heavy)
    issued = passes * flops(lean(loops[0])) * binary.warps
    if binary.has_producer:  # persistent: a program is a turn of the loop that stores, less its tile
        storing = flow.path(lambda block: (count_stores(block), count_work(block), -len(block)), tile)
        program = (total(flow.instructions(storing)) - total(lean(tile))) * binary.warps
        feeding = flow.innermost(lambda instruction: instruction.operation == "UTMALDG")
        box = 2 * columns * -(-D // 16) * 16 * 2  # bytes of K and V that the copy engine writes
        fed = min(total(lean(loop)) for loop in feeding) + Cost(shared=box / SHARED_BYTES)
        full, masked = full + fed, masked + fed
    else:
        whole = flow.path(lambda block: (count_work(block) + count_stores(block), -len(block)))
        once = [total(lean(loop)) for loop in ([tile] if passes > 1 else loops)]
        program = (total(flow.instructions(whole)) - sum(once, Cost())) * binary.warps
    return TileCosts(full, masked, program, issued)


# Launches


@dataclass(frozen=True)
class Launch:
    """What a launch takes: of all warps; bytes between L2 and multiprocessors, and of HBM; `busy`: share of the time
    until the last block is done in which multiprocessors have one."""

    name: str
    amounts: Cost
    l2_bytes: float
    hbm_bytes: float
    busy: float
    tile: TileCosts | None = None
    issued_flops: float = 0


def busy_of(costs: np.ndarray, resident: int, persistent: bool) -> float:
    """costs: of programs in launch order, by the model of testing/waves.py; a persistent block takes every 132nd."""
    if persistent:
        last = max(costs[start::MULTIPROCESSORS].sum() for start in range(min(MULTIPROCESSORS, len(costs))))
    else:
        last = waves.shared_makespan(costs, MULTIPROCESSORS, resident)
    return costs.sum() / (MULTIPROCESSORS * last)


def busy_share(items: np.ndarray, batch_heads: int, group: int, resident: int, persistent: bool) -> float:
    return busy_of(waves.program_costs(items, batch_heads, group), resident, persistent)


def attention_launch(case: Case, binary: Binary) -> Launch:
    """Of `binary` on a case: tiles of its schedule times what they cost."""
    (rows, columns), products, T = binary.block, binary.products, case.tokens
    tables = make_tables(case.segments, T, T, rows, columns, products.by_key)
    items = tables.items
    heads, share = (case.key_heads, case.H // case.key_heads) if products.by_key else (case.H, 1)
    programs = case.B * heads
    full = int(items[:, 3].sum() + items[:, 5].sum()) * share * programs
    masked = int(column_tiles(items).sum()) * share * programs - full
    tile = tile_costs(binary, case.D)
    amounts = tile.full * full + tile.masked * masked + tile.program * (len(items) * programs)
    token = case.D * case.dtype.itemsize
    moved = products.columns * columns * (full + masked) + products.rows * T * programs
    own, other = case.B * T * heads, case.B * T * (case.H if products.by_key else case.key_heads)
    unique = (products.rows * own + products.columns * other) * token
    statistics = 4 * products.statistics * case.B * case.H * T
    visited = share * T if products.by_key else T * case.key_heads // case.H
    group = heads_per_group(programs, 2 * max(1, visited) * token)
    busy = busy_share(items, programs, group, binary.resident, binary.has_producer)
    issued = tile.flops * (full + masked)
    return Launch(binary.name, amounts, moved * token + statistics, unique + statistics, busy, tile, issued)


def attention_binaries(case: Case, direction: str, backend: str) -> list[Binary]:
    """The kernels of one call, in order of their launches; none where the backend does not serve the head dim."""
    if backend == "cuda":
        if case.D not in HEAD_DIMS:
            return []
        return cuda_attention("sm90.cu" if direction == "forward" else "sm80_backward.cu", case.D)
    kernels = ["attention_forward"] if direction == "forward" else ["attention_backward_dq", "attention_backward_dkv"]
    heads = case.H, case.key_heads
    return [triton_attention(kernel, case.lengths, case.mask, case.op, heads, case.D) for kernel in kernels]
