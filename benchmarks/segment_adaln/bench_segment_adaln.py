"""The adaLN family; shift, scale and gate are strided chunks of one projection, as in the model."""

from benchmarks.cases import ADALN
from benchmarks.kernel_groups import kernel_groups

GROUPS = kernel_groups(ADALN)


def test_speed(group, candidate, report):
    report(group, candidate)
