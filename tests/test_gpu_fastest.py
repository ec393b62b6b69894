"""benchmarks/gpu/fastest.py on planted results: never a wrong, an unchecked or a slower backend."""

import json

import pytest

from benchmarks.gpu import fastest

BACKENDS = ("cuda", "triton")
OP = "block_causal_attention"
ENVIRONMENT = {"architecture": "sm90", "device": "H200", "commit": "abc", "dry_run": False}


def timed(backend, milliseconds, direction="forward", shape="B32", op=OP, width=72):
    case = {"registered_op": op, "dtype": "bfloat16", "width": width, "shape": shape, "direction": direction}
    return case | {"backend": backend, "milliseconds": {backend: {"median": milliseconds}}}


def both(cuda, triton, **case):
    """Rows of (forward, backward) milliseconds."""
    times = {"cuda": cuda, "triton": triton}
    ways = ("forward", "backward")
    return [timed(b, t, way, **case) for b in times for way, t in zip(ways, times[b], strict=True)]


def planted(folder, rows, ops=(OP,), widths=(72,), environment=ENVIRONMENT, **changed):
    """Results in which both backends pass everything, but for the rows that are `changed`."""
    cases = [{"op": op, "dtype": "bfloat16", "width": w, "backend": b} for op in ops for w in widths for b in BACKENDS]
    stages = {
        "correctness": [case | {"case": "c", "ratios": {"out0": 1.0}} for case in cases],
        "determinism": [case | {"repeats": 1000, "differing": 0} for case in cases],
        "sanitizer": [
            {"tool": tool, "backend": b, "passed": True, "ops": list(ops)}
            for tool in ("memcheck", "racecheck", "initcheck")
            for b in BACKENDS
        ],
        "kernels": rows,
    }
    folder.mkdir()
    for stage, content in (stages | changed).items():
        content = {"environment": environment, "rows": content}
        (folder / f"{stage}.json").write_text(json.dumps(content))
    return folder


def chosen(folder):
    return fastest.choose(folder)[1]


def test_fastest_is_by_forward_and_backward_over_all_shapes(tmp_path):
    faster = planted(tmp_path / "a", both((1.0, 3.0), (2.0, 3.0)))
    assert chosen(faster) == {f"{OP}/16bit/80": "cuda"}
    slower = planted(tmp_path / "b", both((1.0, 4.5), (2.0, 3.0)))
    assert chosen(slower) == {f"{OP}/16bit/80": "triton"}, "a fast forward does not make up for its backward"
    mixed = both((1.0, 1.0), (1.1, 1.1)) + both((3.0, 3.0), (1.0, 1.0), shape="B1")
    assert chosen(planted(tmp_path / "c", mixed)) == {f"{OP}/16bit/80": "triton"}
    history = "history_attention"
    rows = [timed("cuda", 1.0, op=history), timed("triton", 1.2, op=history)]
    assert chosen(planted(tmp_path / "d", rows, ops=(history,))) == {f"{history}/16bit/80": "cuda"}


@pytest.mark.parametrize("stage", ["correctness", "correctness_tuned", "determinism", "sanitizer"])
def test_a_wrong_backend_is_never_chosen(tmp_path, stage):
    case = {"op": OP, "dtype": "bfloat16", "width": 72, "case": "c"}
    good = {"ratios": {"out0": 1.0}, "differing": 0, "tool": "memcheck", "passed": True, "ops": [OP]}
    rows = [case | good | {"backend": b, "tool": t} for b in BACKENDS for t in ("memcheck", "racecheck", "initcheck")]
    bad = {
        "correctness": {"failed": "error"},
        "correctness_tuned": {"failed": "error"},
        "determinism": {"differing": 1},
    }
    bad["sanitizer"] = {"tool": "synccheck", "passed": False}
    rows.append(case | good | {"backend": "cuda"} | bad[stage])
    folder = planted(tmp_path / "a", both((1.0, 1.0), (2.0, 2.0)), **{stage: rows})
    assert chosen(folder) == {f"{OP}/16bit/80": "triton"}
    assert any("cuda not chosen" in line for line in fastest.choose(folder)[2])


@pytest.mark.parametrize("stage", ["correctness", "determinism", "sanitizer"])
def test_a_backend_that_was_not_checked_is_never_chosen(tmp_path, stage):
    rows = both((1.0, 1.0), (2.0, 2.0))
    assert chosen(planted(tmp_path / "a", rows, **{stage: []})) == {}
    other = rows + both((1.0, 1.0), (2.0, 2.0), width=128)
    assert chosen(planted(tmp_path / "b", other)) == {f"{OP}/16bit/80": "cuda"}, "D 128 was not checked"


def test_without_a_measurement_nothing_is_listed(tmp_path):
    forward = [timed("cuda", 1.0), timed("triton", 2.0)]
    assert chosen(planted(tmp_path / "a", forward)) == {}
    partly = both((1.0, 1.0), (2.0, 2.0)) + both((1.0, 1.0), (2.0, 2.0), shape="B1")[1:]
    assert chosen(planted(tmp_path / "b", partly)) == {f"{OP}/16bit/80": "triton"}, "cuda lacks a forward"
    assert chosen(planted(tmp_path / "c", [])) == {}


def test_the_table_keeps_other_architectures(tmp_path):
    table = tmp_path / "fastest.json"
    others = {"sources": {"sm80": "a100", "sm90": "old"}, "backends": {"sm80": {"x": "cuda"}, "sm90": {"y": "cuda"}}}
    table.write_text(json.dumps(others))
    folder = planted(tmp_path / "results", both((1.0, 1.0), (2.0, 2.0)))
    fastest.main([str(folder), "--table", str(table)])
    written = json.loads(table.read_text())
    assert written["backends"] == {"sm80": {"x": "cuda"}, "sm90": {f"{OP}/16bit/80": "cuda"}}
    assert written["sources"] == {"sm80": "a100", "sm90": str(folder)}


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    rows = both((1.0, 1.0), (2.0, 2.0))
    dry = planted(tmp_path / "a", rows, environment=ENVIRONMENT | {"dry_run": True})
    with pytest.raises(SystemExit, match="of a dry run"):
        fastest.choose(dry)
    mixed = planted(tmp_path / "b", rows)
    content = json.loads((mixed / "sanitizer.json").read_text())
    content["environment"]["commit"] = "older"
    (mixed / "sanitizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the stages differ in commit"):
        fastest.choose(mixed)
    (mixed / "kernels.json").unlink()
    with pytest.raises(SystemExit, match=r"no stage kernels; expected the results of `make gpu-check`"):
        fastest.choose(mixed)
