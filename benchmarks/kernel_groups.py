"""The jobs of a room as groups for `pytest benchmarks`, on the device of this machine."""

from __future__ import annotations

from functools import cache

import torch

from benchmarks.board import Group
from benchmarks.gpu.machine import ceilings
from benchmarks.jobs import cpu_jobs, gpu_jobs
from benchmarks.measure import How, Job, Measurement, measure, our_backends, peer_makers
from benchmarks.rows import best_device


def kernel_groups(ops: tuple[str, ...]) -> list[Group]:
    """A group for each job whose op is one of `ops`."""
    jobs = gpu_jobs() if best_device().type == "cuda" else cpu_jobs()
    return [as_group(job) for job in jobs if job.case.registered_op in ops]


@cache
def gpu_ceilings(device: torch.device) -> dict[str, float]:
    """Rates by unit, measured once in a run; on the CPU every job times its own."""
    if device.type != "cuda":
        return {}
    found = ceilings(device, 20)
    return {"TFLOP/s": found["matmul_bf16_TFLOP_per_s"], "GB/s": found["copy_GB_per_s"]}


def as_group(job: Job) -> Group:
    device = best_device()
    backends = our_backends(job.case, device)
    names = (*backends, *peer_makers(job.case, device))
    how = How(seconds=2.0, rounds=200, warmup=3)

    def run() -> Measurement:
        return measure(job, device, backends, how, ceiling=gpu_ceilings(device).get(job.bound))

    return Group(job.label, names, run)
