"""One training step of the student against the published design."""

from functools import partial

from ard.model import DiTConfig

from benchmarks.board import Group
from benchmarks.rows import best_device
from benchmarks.student.work import compare_training

DEVICE = best_device()
# Model, batches, goals: design section 6. With 32 the published design needs more than 80 GB.
if DEVICE.type == "cuda":
    MODEL, BATCHES, GOALS = "DiT-XL/2", (8, 32), {"published_eager": 2.0, "published_compiled": 1.3}
else:
    MODEL, BATCHES, GOALS = "DiT-S/2", (1,), {"published_eager": 1.6, "published_compiled": 1.0}
COMPILE_OURS = DEVICE.type == "cuda"  # on the CPU Inductor finds nothing to gain in it, and takes 30 s
NAMES = ("ours", *(["ours_compiled"] if COMPILE_OURS else []), *GOALS)

GROUPS = [
    Group(
        f"training {MODEL} B{batch}",
        NAMES,
        partial(
            compare_training, MODEL, DiTConfig.from_name(MODEL), batch, DEVICE, goals=GOALS,
            compile_options={"dynamic": False}, seconds=30.0, rounds=20, warmup=1,
            compile_ours=COMPILE_OURS,
        ),
    )
    for batch in BATCHES
]  # fmt: skip


def test_step(group, candidate, report):
    report(group, candidate)
