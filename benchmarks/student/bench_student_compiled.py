"""One training step of the student against the published design compiled, which takes Inductor minutes."""

from benchmarks.student.work import training_groups
from benchmarks.timing import DEVICE

GROUPS = training_groups({"published_compiled": 1.3 if DEVICE.type == "cuda" else 1.0})


def test_step(group, candidate, report):
    report(group, candidate)
