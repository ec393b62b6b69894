"""The adaLN family; shift, scale and gate are strided chunks of one projection, as in the model."""

from benchmarks.measure import kernel_groups
from testing.cases import ADALN

GROUPS = kernel_groups(*ADALN)


def test_speed(group, candidate, report):
    report(group, candidate)
