"""What the launches of history attention take of a Hopper GPU, step by step: append, attend, add splits up.

The Triton kernel appends and attends in one launch: its first loop goes over tiles of the cache, its second one over
those of the own segment, which `tile_costs` gives as its full and its masked tile. CUDA C++ appends in a launch of its
own, and attends by the mma.sync kernel. The sums of splits are counted by their bytes; what a split leaves stays in L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.block_causal_attention.spec import empty_output
from ard_kernels.block_causal_attention.tiles import column_tiles
from ard_kernels.common import extension, tuning
from ard_kernels.history_attention import triton_impl
from ard_kernels.history_attention.places import Place, Stand, new_positions
from ard_kernels.history_attention.splits import share_tiles
from ard_kernels.history_attention.tiles import make_tables
from benchmarks.aot import compiled_by
from benchmarks.chip import MULTIPROCESSORS
from benchmarks.cuda_objects import cuobjdump, launch_bounds, nvcc_cubin, short_names
from benchmarks.launches import (
    ARCHITECTURE,
    FORWARD,
    Binary,
    Launch,
    busy_of,
    count_stores,
    count_work,
    cuda_attention,
    cuda_kernels,
    tile_costs,
    total,
    triton_attention,
    triton_binary,
)
from benchmarks.sass import Cost, disassemble
from testing import emulator, waves
from testing.cases import MASKS, Case

Constants = tuple[tuple[str, int], ...]  # name and value
APPEND = Path(__file__).resolve().parents[1] / "csrc" / "history_attention" / "append.cu"


class Step(NamedTuple):
    """One call: a segment of `length` tokens of a case, written and attended to at `place`."""

    case: Case
    length: int
    place: Place

    @property
    def past(self) -> list[int]:
        """Tokens of the two runs of earlier ones that it sees."""
        return [stop - start for start, stop in self.place.past(self.length)]

    @property
    def flops(self) -> int:
        return 4 * self.case.B * self.case.H * self.case.D * self.length * (sum(self.past) + self.length)

    @property
    def segment_bytes(self) -> int:
        """Of one tensor (B, H, length, D)."""
        return self.case.B * self.case.H * self.length * self.case.D * self.case.dtype.itemsize


def growing(case: Case) -> list[Step]:
    """Of all segments of a case, one after the other."""
    window, sink = MASKS[case.mask]
    stand = Stand(new_positions(1, case.tokens, None).tolist(), 1, 0)
    stand.add(case.lengths)
    return [Step(case, length, stand.place(i, window, sink)) for i, length in enumerate(case.lengths)]


def rolling(case: Case, window: int, sink: int) -> Step:
    """Of a ring that is full: the first segment that overwrites another."""
    (length,) = case.lengths
    positions = new_positions(1, (window + sink) * length, (length, window, sink)).tolist()
    return Step(case, length, Stand(positions, 1, window + sink).place(window + sink, None, 0))


# Compiled kernels


def triton_config(step: Step, constants: Constants) -> dict[str, int]:
    key = tuning.key("attention_history", step.case.dtype, step.case.D, step.length)
    return tuning.shipped(ARCHITECTURE)[key] | dict(constants)


@cache
def triton_history(step: Step, is_split: bool, constants: Constants = ()) -> Binary:
    """The kernel that a call on one sample compiles."""
    (H, D, dtype), keys = (step.case.H, step.case.D, step.case.dtype), sum(step.past) + step.length
    q, k, v = torch.empty(3, 1, H, step.length, D, dtype=dtype).unbind()
    cached = torch.empty(2, 1, H, keys, D, dtype=dtype).unbind()
    # As many multiprocessors as make the call split its keys, or not.
    with tuning.override({}, multiprocessors=1 << 20 if is_split else 1):
        launches = compiled_by(
            lambda: triton_impl.forward(q, k, v, *cached, empty_output(q), torch.empty(1), step.place, 0.1),
            {"append_and_attend"}, ARCHITECTURE, triton_config(step, constants),
        )  # fmt: skip
    return triton_binary("Triton history", FORWARD, launches[0])


@cache
def cuda_history(D: int, is_split: bool) -> Binary:
    rows, columns = (extension.emulated or emulator.load()).attention_history_block(D)
    wanted = f"ForwardTraits<{D}, {rows}>, {str(is_split).lower()}>"
    for short, flow, registers, threads in cuda_kernels("sm80_forward.cu", D):
        if wanted in short:
            return Binary("mma.sync history", flow, registers, threads, 0, (rows, columns), FORWARD)
    raise ValueError(f"history_launches: sm80_forward.cu has no kernel {wanted}")


@cache
def append_cost() -> tuple[Cost, int]:
    """(of a warp, threads of a block)"""
    path = nvcc_cubin(APPEND)
    bounds = launch_bounds(cuobjdump("-elf", str(path)))
    flows = disassemble(path)
    (name,) = (long for long, short in zip(flows, short_names(list(flows)), strict=True) if "bfloat16" in short)
    way = flows[name].path(lambda block: (count_stores(block), -len(block)))
    return total(flows[name].instructions(way)), bounds[name]


# Launches


def workspace_bytes(step: Step, splits: int) -> int:
    """fp32 outputs, maxima and totals of the splits, if there are several."""
    return 4 * splits * step.case.B * step.case.H * step.length * (step.case.D + 2) * (splits > 1)


def append_share(binary: Binary) -> Cost:
    """What the copy of its rows to the cache takes of a program of the Triton kernel, all warps."""

    def way(sign: int) -> Cost:
        flow = binary.flow
        return total(flow.instructions(flow.path(lambda b: (count_work(b), sign * count_stores(b), -len(b)))))

    return (way(1) - way(-1)) * binary.warps


def attended(
    step: Step, binary: Binary, tiles: tuple[int, int], splits: tuple[int, int] | None = None, appends: bool = False
) -> Launch:
    """tiles: of a row tile, those of the first kind and those of the second (`tile_costs`). splits: how many, and the
    column tiles of each, if keys are split. appends: the launch copies the segment to the cache."""
    (rows, columns), token = binary.block, step.case.D * step.case.dtype.itemsize
    count, per_split = splits or (1, sum(tiles))
    row_tiles = -(-step.length // rows) * step.case.B * step.case.H
    costs = tile_costs(binary, step.case.D)
    amounts = (costs.full * tiles[0] + costs.masked * tiles[1] + costs.program * count) * row_tiles
    if appends:  # programs of the first split do, and `program` has it
        amounts = amounts - append_share(binary) * (row_tiles * (count - 1))
    left = [min(per_split, sum(tiles) - per_split * split) + waves.FIXED_TILES for split in range(count)]
    busy = busy_of(np.repeat(np.array(left, float), row_tiles), binary.resident, binary.has_producer)
    past, own = sum(step.past) * step.case.B * step.case.H * token, step.segment_bytes
    copied, out = 2 * own * appends, own * (count == 1)  # k and v are read as keys anyway; splits write the workspace
    hbm = own + out + 2 * (past + own) + copied
    l2 = own * count + out + 2 * copied + workspace_bytes(step, count) + 2 * columns * token * sum(tiles) * row_tiles
    return Launch(binary.name, amounts, l2, hbm, busy, costs, costs.flops * sum(tiles) * row_tiles)


def added(step: Step, splits: int) -> Launch:
    """The sum of the splits, by its bytes."""
    return Launch("splits", Cost(), workspace_bytes(step, splits) + step.segment_bytes, step.segment_bytes, 1.0)


def appended(step: Step) -> Launch:
    """The append of CUDA C++; a thread copies 16 bytes of k and of v."""
    own, threads = append_cost()
    blocks = -(-step.length * (step.case.D // 8) // threads) * step.case.B * step.case.H
    nbytes = 4 * step.segment_bytes
    return Launch("append", own * (threads // 32 * blocks), nbytes, nbytes, 1.0)


def table_tiles(step: Step, runs: Sequence[Run], block: tuple[int, int]) -> tuple[int, int]:
    """(full, masked) of each row tile by the tables."""
    items = make_tables(step.length, runs, *block).items
    full = int(items[0, 3] + items[0, 5])
    return full, int(column_tiles(items)[0]) - full


def triton_tiles(step: Step, columns: int) -> tuple[int, int]:
    """(of the cache, of the own segment)"""
    return sum(-(-run // columns) for run in step.past), -(-step.length // columns)


def splits_of(step: Step, rows: int, tiles: tuple[int, int]) -> tuple[int, int]:
    return share_tiles(-(-step.length // rows) * step.case.B * step.case.H, sum(tiles), MULTIPROCESSORS)


def history_launches(step: Step, backend: str, constants: Constants = ()) -> list[Launch]:
    """Those of one call, in order: of CUDA C++ the append, attention, of few rows the sum of the splits. constants: of
    the Triton kernel, for those of the table."""
    if backend == "triton":
        config = triton_config(step, constants)
        tiles = triton_tiles(step, config["BLOCK_N"])
        splits = splits_of(step, config["BLOCK_M"], tiles)
        found = [attended(step, triton_history(step, splits[0] > 1, constants), tiles, splits, appends=True)]
    else:
        block = cuda_history(step.case.D, False).block
        tiles = table_tiles(step, step.place.runs, block)
        splits = splits_of(step, block[0], tiles)
        found = [appended(step), attended(step, cuda_history(step.case.D, splits[0] > 1), tiles, splits)]
    return found + [added(step, splits[0])] * (splits[0] > 1)


def attention_alone(step: Step, backend: str) -> Launch:
    """segment_attention of the same queries over the same keys, ready one behind the other."""
    case, keys = step.case, sum(step.past) + step.length
    if backend == "triton":
        heads = case.H, case.key_heads
        binary = triton_attention("attention_forward", (step.length,), case.mask, case.op, heads, case.D)
    else:
        (binary,) = cuda_attention("sm90.cu", case.D)
    return attended(step, binary, table_tiles(step, [(0, keys)], binary.block))
