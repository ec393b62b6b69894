"""Processes started by torchrun, one per GPU (NCCL), or on the CPU (gloo)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# For work that ranks share out beforehand: the slowest GPU may finish hours after the others.
PATIENT = timedelta(days=7)


@dataclass(frozen=True)
class Process:
    """This process among its equals; without torchrun the only one. Collectives are no-ops for one process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows: contiguous, in rank order, sizes differing by one at most."""
        return rows.tensor_split(self.world_size)[self.rank]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, on every rank."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows (n_r, ...) concatenated in rank order, on every rank."""
        if self.world_size == 1:
            return rows
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        longest = max(int(size) for size in sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


@contextmanager
def started(device: str | None = None, patience: timedelta | None = None) -> Iterator[Process]:
    """The process of torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), its group open inside the context.

    device: "cpu" or "cuda"; the GPU of the local rank where there is one, by default.
    patience: how long a collective waits for a slower rank; torch's default finds hangs after 10 or 30 minutes.
    """
    available = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    kind = available[-1] if device is None else device
    if kind not in available:
        raise ValueError(f"device: got {kind!r}; expected one of {available}, the GPU is that of the local rank")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if "RANK" not in os.environ:
        yield Process(device=place)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=patience)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
