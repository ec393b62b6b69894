"""One training step of the student against the published design."""

from functools import partial

from ard.model import DiTConfig

from benchmarks.board import Group
from benchmarks.rows import best_device
from benchmarks.student.work import compare_training

DEVICE = best_device()
NAMES = ("ours", "published_eager", "ours_compiled", "published_compiled")
# Model, batch, goals, seconds: design section 6.
if DEVICE.type == "cuda":
    MODEL, BATCH, GOALS, SECONDS = "DiT-XL/2", 32, {"published_eager": 2.0, "published_compiled": 1.3}, 30.0
else:
    MODEL, BATCH, GOALS, SECONDS = "DiT-S/2", 1, {"published_eager": 1.6, "published_compiled": 1.0}, 60.0

GROUPS = [
    Group(
        f"training {MODEL} B{BATCH}",
        NAMES,
        partial(
            compare_training, MODEL, DiTConfig.from_name(MODEL), BATCH, DEVICE, goals=GOALS,
            compile_options={"dynamic": False}, seconds=SECONDS, rounds=20, warmup=3,
        ),
    )
]  # fmt: skip


def test_step(group, candidate, report):
    report(group, candidate)
