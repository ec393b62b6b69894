"""The kernel benchmarks as a stage: every job of benchmarks/jobs.py, until the time is over."""

from __future__ import annotations

import torch

from benchmarks.gpu import checklist
from benchmarks.gpu.fastest import compare_backends, faster_words
from benchmarks.gpu.log import Found
from benchmarks.gpu.record import COMPILE_LIMIT, LIMIT, Record
from benchmarks.jobs import gpu_jobs
from benchmarks.measure import How, Job, measure, our_makers, peer_makers
from benchmarks.rows import verdict
from testing.cases import BACKENDS

# A job prepares a dozen candidates, some of which Inductor compiles, and times them.
JOB_LIMIT = 300.0


def bench(record: Record, job: Job, ceiling: float | None) -> list[dict]:
    """A row for each of our backends; what goes wrong with one of them is a failure of the stage."""
    case, device, dry = job.case, record.device, record.dry
    ours = checklist.serving(record, case)

    def label(name: str) -> str:
        return f"{job.label} on {name}"

    names = [*our_makers(case, ours, device), *peer_makers(case, device, not dry)]
    found = measure(
        job, device, ours, How(3.0, 2, 1, compiled=False) if dry else How(3.0, 200, 5), ceiling=ceiling,
        skip={name: "it ended the process" for name in names if label(name) in record.crashed},
        piece=lambda name: record.piece(label(name), LIMIT if name in BACKENDS else COMPILE_LIMIT),
    )  # fmt: skip
    failed = {name: why for name, why in found.refused.items() if name in ours and label(name) not in record.crashed}
    for name, reason in (failed | found.wrong).items():
        record.fail(f"{label(name)}: {reason}")
    for name, reason in (found.refused | found.wrong).items():
        print(f"    {name} not timed: {reason[:160]}", flush=True)
    if not found.rows:
        raise RuntimeError(f"no backend of ours can be timed: {found.refused | found.wrong}")
    return found.rows


def measured_ceilings(record: Record) -> dict[str, float]:
    """Rates by unit, from the environment stage of this run; empty when it left none."""
    rows = record.log.read().get("environment", Found()).rows
    if not rows:
        return {}
    found = rows[0]["ceilings"]
    return {"TFLOP/s": found["matmul_bf16_TFLOP_per_s"], "GB/s": found["copy_GB_per_s"]}


def kernels(record: Record) -> str:
    """The rows of every job until the time is over; then which of our backends is the fastest, by shape class."""
    ceilings, work = measured_ceilings(record), gpu_jobs(record.dry)
    for job in work:
        if record.over:
            break

        def run(job=job):
            torch.manual_seed(0)
            for result in bench(record, job, ceilings.get(job.bound)):
                text = "ran" if record.dry else "; ".join(map(verdict, result["targets"]))
                record.add(result, f"{job.label} on {result['backend']}: {text}")

        record.attempt(job.label, run, JOB_LIMIT)
        torch.compiler.reset()
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    record.facts["shape_classes"] = compare_backends(record.rows)
    if not record.dry:
        print("  forward + backward (history: forward) of our backends, geometric mean over the shapes of a class")
        for shapes, result in record.facts["shape_classes"].items():
            print(f"  {shapes}: {faster_words(result)}")
    return f"{len(record.rows)} rows of {len(work)} jobs"
