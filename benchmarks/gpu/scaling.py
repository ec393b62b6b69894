"""Growth over segments and tokens, and the time that history adds, as a stage: the groups of those two rooms."""

from __future__ import annotations

import torch

from benchmarks.board import Group
from benchmarks.flop_overhead import bench_flop_overhead
from benchmarks.gpu.record import Record
from benchmarks.growth import bench_growth
from benchmarks.tables import speed_ratio

# Two students are run eagerly, then captured and timed.
GROUP_LIMIT = 90.0


def scaling(record: Record) -> str:
    overhead, points = bench_flop_overhead.GROUPS, bench_growth.GROUPS
    for group in points[:1] if record.dry else [*overhead, *points]:
        if not record.over:
            record.attempt(group.label, lambda group=group: keep(record, group), GROUP_LIMIT)
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    return f"{len(record.rows)} rows"


def keep(record: Record, group: Group) -> None:
    torch.manual_seed(0)
    for row in group.measure().rows:
        record.add(row, f"{row['shape']} {row['direction']}: {'ran' if record.dry else speed_ratio(row)}")
