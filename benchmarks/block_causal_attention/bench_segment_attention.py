"""Attention over segments in the shapes of streaming video models and robot policies, masks and heads as theirs."""

from benchmarks.measure import kernel_groups
from testing.cases import SEGMENT

GROUPS = kernel_groups(SEGMENT)


def test_speed(group, candidate, report):
    report(group, candidate)
