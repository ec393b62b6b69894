"""Norm and rotary embedding of q and k, views of one packed projection."""

from benchmarks.measure import kernel_groups

GROUPS = kernel_groups("qk_norm_rope")


def test_speed(group, candidate, report):
    report(group, candidate)
