"""Block-causal attention, q, k, v read from one packed projection as in the model."""

from benchmarks.measure import kernel_groups

GROUPS = kernel_groups("block_causal_attention")


def test_speed(group, candidate, report):
    report(group, candidate)
