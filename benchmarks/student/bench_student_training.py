"""One training step of the student against the published design."""

from benchmarks.student.work import training_groups
from benchmarks.timing import DEVICE

GROUPS = training_groups({"published_eager": 2.0 if DEVICE.type == "cuda" else 1.65})


def test_step(group, candidate, report):
    report(group, candidate)
