"""The benchmark code: what a run writes, that the documents agree with it, and that a regression is found."""

import copy
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from ard.model import DiTConfig

import ard_kernels
from benchmarks import compare, plots, report, rows
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.flop_overhead import bench_flop_overhead
from benchmarks.flop_overhead.counts import design_table
from benchmarks.growth import bench_growth
from benchmarks.jobs import adaln_job, attention_job, cpu_jobs, gpu_jobs, history_job
from benchmarks.measure import How, measure, our_backends, peer_makers
from benchmarks.memory import peak_bytes
from benchmarks.rows import environment, goal, row
from benchmarks.student import work
from benchmarks.tables import growth_table, speed_table
from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
CPU = torch.device("cpu")
TINY = [
    attention_job(1, 8, 16, "M4", "forward+backward", 1.0, S=2, H=1, dtype=torch.float32),
    adaln_job("gate_residual_adaln", 1, 8, 24, torch.float32, "forward+backward", 1.0, S=2, dtype=torch.float32),
    history_job(1, 16, L=8, S=2, H=1, dtype=torch.float32),
]


def tiny_measurement(job):
    return measure(job, CPU, our_backends(job.case, CPU), How(0.1, 3, 1, compiled=False))


def committed_results():
    """Those of comparisons: the stages of a GPU that check or tune have rows of their own."""
    return [
        pytest.param(device, room, id=f"{device}-{room}")
        for device, rooms in report.load_devices().items()
        for room, content in rooms.items()
        if content.get("stage", "kernels") in ("kernels", "student", "scaling")
    ]


@pytest.mark.parametrize("device, room", committed_results())
def test_committed_results_follow_the_schema(device, room):
    jsonschema.validate(report.load_devices()[device][room], SCHEMA)


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_result_files(path):
    text = path.read_text()
    assert len(report.BLOCK.findall(text)) >= 3
    assert report.refreshed(text, report.load_devices()) == text, "run: python -m benchmarks.report"


def test_a_number_typed_into_a_document_is_found(monkeypatch, tmp_path, capsys):
    edited = tmp_path / "README.md"
    text = report.DOCUMENTS[0].read_text()
    edited.write_text(text.replace("959,843,008,512", "959,843,008,513", 1))
    assert edited.read_text() != text
    monkeypatch.setattr(report, "DOCUMENTS", (edited,))
    assert report.main(["--check"]) == 1 and "out of date: README.md" in capsys.readouterr().out


@pytest.mark.parametrize("job", TINY, ids=lambda job: job.case.op)
def test_every_candidate_is_timed_or_refused_with_a_reason(job):
    found = tiny_measurement(job)
    names = {*our_backends(job.case, CPU), *peer_makers(job.case, CPU, compiled=False)}
    assert names == {n for n in found.timings if n not in ("copy", "matmul")} | set(found.refused)
    assert not found.wrong and all(found.refused.values())
    jsonschema.validate({"environment": environment(), "rows": found.rows}, SCHEMA)
    (result,) = found.rows
    assert result["best_peer"] in names and result["rate"] > 0 and result["ceiling"] > 0
    assert result["op"] in speed_table(found.rows)


def test_other_results_are_not_timed(monkeypatch):
    """Of ours: no row is left. The peers agree with each other, so it is ours that is wrong."""
    honest = ard_kernels.gate_residual_adaln

    def faulty(*args, **kwargs):
        h, y = honest(*args, **kwargs)
        return h, 1.001 * y

    monkeypatch.setattr(ard_kernels, "gate_residual_adaln", faulty)
    found = tiny_measurement(TINY[1])
    assert set(found.wrong) == {"cpu"} and not found.rows
    assert "differs from eager" in found.wrong["cpu"]


def test_jobs_are_those_of_the_design():
    shapes = {(job.case.registered_op, job.direction) for job in cpu_jobs()}
    assert {op for op, _ in shapes} == {op for op, _ in {(j.case.registered_op, j.direction) for j in gpu_jobs()}}
    assert len({job.label for job in cpu_jobs()}) == len(cpu_jobs())
    (model,) = [
        job
        for job in cpu_jobs()
        if job.label == "block_causal_attention B1 H16 S4 L256 D72 float32 M4 packed forward+backward"
    ]
    # 10 of 16 tiles of 256 x 256; 2 matmuls forward, 5 backward; q, k, v, out, then twice as many
    assert model.flops == 7 * 2 * 16 * 72 * 10 * 256 * 256
    assert model.nbytes == 12 * 16 * 72 * 1024 * 4
    assert model.target == 1.1


def test_design_table_to_the_last_integer():
    counted = {entry["work"]: entry["counted"] for entry in design_table()}
    assert counted == {entry["work"]: entry["analytic"] for entry in design_table()}
    assert counted["student sampling, N=6"] - counted["student, N=0 (4 forwards)"] == 10_871_635_968
    assert counted["published design, sampling, N=6"] == 1_420_082_675_712
    assert counted["published design, training forward"] == 1_510_679_642_112


def test_written_results_do_not_make_a_commit_dirty(monkeypatch, tmp_path):
    for name in ("benchmarks/results/cpu.json", "benchmarks/measure.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    for name, dirty in (("benchmarks/results/cpu.json", False), ("README.md", False), ("benchmarks/measure.py", True)):
        (tmp_path / name).write_text("after")
        assert environment()["dirty"] is dirty, name


def test_the_driver_is_named_where_there_is_no_nvidia_smi(monkeypatch, tmp_path):
    """By a stand-in for libcuda, which any torch that sees a GPU has loaded."""
    source = tmp_path / "cuda.cpp"
    source.write_text('extern "C" int cuDriverGetVersion(int *version) { *version = 13020; return 0; }\n')
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-fPIC", str(source), "-o", library], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cuda"))["driver"] == "for CUDA 13.2"


def test_peak_memory_is_that_of_the_call():
    found = peak_bytes(lambda: torch.ones(25_000_000).add_(1), CPU)
    if found is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 95e6 < found < 150e6


PLANTED = """
from functools import partial
from benchmarks.board import Group
from benchmarks.measure import Measurement
from benchmarks.rows import row
from benchmarks.timing import Timing

timings = {name: Timing(tuple(x * (1 + i / 100) for i in range(9))) for name, x in (("ours", 2.0), ("fast", 3.0))}

def compare(wrong):
    refused = {"absent": "ModuleNotFoundError: no such peer"}
    rows = [row("op", "shape", "forward", timings, "ours", ["fast"], 1.2, refused=refused)]
    return Measurement(rows, timings, refused, {"odd": "differs"} if wrong else {})

GROUPS = [Group("group", ("ours", "fast", "absent", *(["odd"] if WRONG else [])), partial(compare, WRONG))]

def test_speed(group, candidate, report):
    report(group, candidate)

def test_facts(room):
    room.facts["counted"] = 7
"""


def run_planted(tmp_path, wrong, *arguments):
    """A benchmark run over one planted file; (what it printed, the result file or None)."""
    (tmp_path / "bench_planted.py").write_text(f"WRONG = {wrong}\n{PLANTED}")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "--rootdir", str(tmp_path), "-rs"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--results", str(out), *(arguments or [str(tmp_path)])]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    file = out / "planted.json"
    return done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else None


def test_a_run_writes_its_file_and_a_table(tmp_path):
    text, content = run_planted(tmp_path, False)
    assert "3 passed, 1 skipped" in text, text
    assert "absent: ModuleNotFoundError: no such peer" in text, "a refused peer is named with its reason"
    assert "2.0800" in text, "pytest-benchmark shows the times that were measured: 2.08 ms, the median of nine"
    assert "1.50x | 1.20x, met" in text
    jsonschema.validate(content, SCHEMA)
    assert content["counted"] == 7
    (result,) = content["rows"]
    assert result["ratio"] == pytest.approx(1.5) and result["milliseconds"]["ours"]["rounds"] == 9


def test_a_run_of_a_part_or_with_a_wrong_candidate_writes_nothing(tmp_path):
    text, content = run_planted(tmp_path, False, "-k", "fast", str(tmp_path))
    assert content is None and "not all of it was selected" in text
    text, content = run_planted(tmp_path, False, f"{tmp_path / 'bench_planted.py'}::test_speed")
    assert content is None and "not all of it was run" in text
    text, content = run_planted(tmp_path, True)
    assert content is None and "1 failed" in text and "a test of it failed" in text


def test_collecting_writes_nothing(tmp_path):
    (tmp_path / "bench_facts.py").write_text("def test_facts(room):\n    room.facts['counted'] = 7\n")
    run_planted(tmp_path, False, "--collect-only", str(tmp_path / "bench_facts.py"))
    assert not (tmp_path / "out").exists()


def results_with(ratio, spread=0.01):
    """A row whose peer takes `ratio` x as long as ours, rounds spread evenly by +- `spread`."""
    rounds = [1 + spread * (i - 10) / 10 for i in range(21)]
    timings = {"ours": Timing((2.0,) * 21), "peer": Timing(tuple(2.0 * ratio * x for x in rounds))}
    return {"rows": [row("op", "shape", "forward", timings, "ours", ["peer"], 1.0)]}


@pytest.mark.parametrize(
    "new, spread, status", [(1.5, 0.01, 0), (1.44, 0.01, 0), (1.35, 0.01, 1), (1.35, 0.8, 0), (1.9, 0.01, 0)]
)
def test_compare_finds_a_regression_beyond_the_noise(tmp_path, capsys, new, spread, status):
    for name, content in (("old", results_with(1.5, spread)), ("new", results_with(new, spread))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "room.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == status
    assert ("SLOWER" in capsys.readouterr().out) == bool(status)


def test_compare_says_what_it_cannot_compare(tmp_path, capsys):
    old, new = results_with(1.5), results_with(1.5)
    extra = copy.deepcopy(new["rows"][0]) | {"shape": "another"}
    new["rows"].append(extra)
    for name, content in (("old.json", old), ("new.json", new)):
        (tmp_path / name).write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
    assert "only in NEW: 1 rows, first op another" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no results"):
        compare.main([str(tmp_path / "missing"), str(tmp_path / "new.json")])


def test_a_report_without_a_peer_or_with_a_missed_goal(tmp_path):
    """What a GPU may leave: a baseline out of memory, a ratio met while the rate is missed."""
    timings = {"ours": Timing((2.0, 2.1, 2.2)), "peer": Timing((3.0, 3.1, 3.2))}
    alone = {"ours": timings["ours"]}
    grown = row(
        "growth", "C72 S4 L64", "training", alone, "ours", [], 1.0, S=4, L=64, refused={"published_eager": "memory"}
    )
    goals = [goal("times the fastest peer", 1.5, 1.3), goal("useful TFLOP/s", 400.0, 450.0)]
    slow = row("block_causal_attention", "B1 D72 M4 ", "forward", timings, "ours", ["peer"], 1.3, targets=goals)
    rooms = {"scaling": {"environment": environment(), "rows": [grown, slow, {"milliseconds": {"config": 1.0}}]}}
    assert "1.30x, met; 450 useful TFLOP/s, missed" in report.measured({"gpu": rooms})
    assert "published design, eager: memory" in report.page("gpu", rooms, plots.draw("gpu", rooms, tmp_path))
    assert "growth" not in growth_table([grown]).splitlines()[-1]


def test_within_noise_is_less_than_the_noise():
    for spread, word in ((0.4, "within noise"), (0.001, "missed")):
        (noisy,) = results_with(0.99, spread)["rows"]
        assert word in speed_table([noisy])


@pytest.fixture
def marked_graphs(monkeypatch):
    """Candidates that `captured` has made, which it marks; and every candidate that is timed by those modules."""
    made, timed = [], []

    def captured(run, device, pool):
        made.append(lambda: run())
        return made[-1]

    def interleaved(candidates, *arguments, **how):
        timed.extend(candidates.values())
        return {name: Timing((1.0, 1.0)) for name in candidates}

    monkeypatch.setattr(work, "captured", captured)
    for module in (bench_flop_overhead, bench_growth):
        monkeypatch.setattr(module, "interleaved", interleaved)
    return made, timed


@pytest.mark.parametrize("way", ["sampling", "training"])
def test_overhead_and_growth_time_graphs_and_not_python(monkeypatch, marked_graphs, way):
    made, timed = marked_graphs
    small = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    monkeypatch.setattr(bench_flop_overhead, "CONFIG", small)
    found = bench_flop_overhead.compare(way, 2, (0, 2), "M4")
    assert timed == made and len(made) == 2 and found.rows[0]["not_captured"] == {}
    bench_growth.compare(way, 2, 16)
    assert timed == made and len(made) == 4


def test_a_published_design_that_does_not_fit_leaves_a_row_of_ours(monkeypatch):
    honest = PublishedStudent.forward

    def out_of_memory(self, states, labels):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, states, labels)

    monkeypatch.setattr(PublishedStudent, "forward", out_of_memory)
    small = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    goals = {"published_eager": 2.0}
    found = work.compare_training("tiny", small, 1, CPU, goals=goals, compile_options={}, seconds=1.0, rounds=2)
    (result,) = found.rows
    assert result["best_peer"] is None and not result["met"] and list(result["milliseconds"]) == ["ours"]
    assert "out of memory" in result["refused"]["published_eager"]
    jsonschema.validate({"environment": environment(CPU), "rows": found.rows}, SCHEMA)
    assert "none" in speed_table(found.rows)


def test_candidates_of_a_training_step_share_the_optimizer(monkeypatch):
    optimizers = []
    honest = work.training_step
    monkeypatch.setattr(
        work, "training_step", lambda model, o, *rest: (optimizers.append(o), honest(model, o, *rest))[1]
    )
    small = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    goals = {"published_eager": 2.0}
    work.compare_training("tiny", small, 1, CPU, goals=goals, compile_options={}, seconds=1.0, rounds=2)
    assert len(optimizers) == 2 and optimizers[0] is optimizers[1], "its states are 5.4 GB of DiT-XL/2"
