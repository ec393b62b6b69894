"""All sampling steps of one layer: append keys and values, attend to what was kept."""

from benchmarks.measure import kernel_groups

GROUPS = kernel_groups("history_attention")


def test_speed(group, candidate, report):
    report(group, candidate)
