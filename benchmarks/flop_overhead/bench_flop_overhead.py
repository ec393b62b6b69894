"""What history costs in FLOPs, counted and by formula."""

from benchmarks.flop_overhead.counts import compare_models, design_table


def test_design_table(room):
    """To the last integer."""
    room.facts["design_table"] = table = design_table()
    assert all(entry["counted"] == entry["analytic"] for entry in table)
    assert [entry["counted"] for entry in table] == [
        237_242_843_136,
        948_971_372_544,
        959_843_008_512,
        959_843_008_512,
        999_705_673_728,
        1_420_082_675_712,
        1_510_679_642_112,
    ]


def test_counts(room):
    room.facts["counts"], different, room.facts["counted_cases"] = compare_models()
    assert not different
