"""What a benchmark run writes, that the documents agree with it, and that a regression is found."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

import ard_kernels
from ard_kernels.tune.timing import EventTimer, Timing
from benchmarks import compare, measure, plots, report, results
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.files import ROOT
from benchmarks.flop_overhead.counts import design_table
from benchmarks.growth import bench_growth
from benchmarks.history_overhead import bench_history_overhead
from benchmarks.measure import How
from benchmarks.memory import peak_bytes
from benchmarks.ops import adaln_job, attention_job, cpu_jobs, gpu_jobs, history_job, our_backends
from benchmarks.results import Row, compared, environment, goal
from benchmarks.student import work
from benchmarks.tables import growth_table, machines_table, speed_table

CPU = torch.device("cpu")
FP32 = {"S": 2, "dtype": torch.float32}
TINY = [
    attention_job(1, 8, 16, "M4", "forward+backward", 1.0, H=1, **FP32),
    adaln_job("gate_residual_adaln", 1, 8, 24, torch.float32, "forward+backward", 1.0, **FP32),
    history_job(1, 16, L=8, H=1, **FP32),
]


def tiny_measurement(job):
    return measure.measure(job, CPU, How(0.1, 3, 1, compiled=False))


def row_with(ratio=1.5, spread=0.01, **others):
    """A row whose peer takes `ratio` x as long as ours, rounds spread evenly by +- `spread`."""
    rounds = [1 + spread * (i - 10) / 10 for i in range(21)]
    timings = {"ours": Timing((2.0,) * 21), "peer": Timing(tuple(2.0 * ratio * x for x in rounds))}
    facts = {"op": "op", "shape": "shape", "direction": "forward"} | others
    return compared(timings, "ours", ["peer"], facts.pop("target", 1.0), **facts)


def write(path, *rows):
    path.write_text(json.dumps({"environment": environment(CPU), "rows": [row.entry() for row in rows]}))


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_committed_results(path):
    text = path.read_text()
    assert len(report.BLOCK.findall(text)) >= 3
    assert report.refreshed(text, report.load_devices()) == text, "run: python -m benchmarks.report"


def test_the_documents_are_of_cpus_with_all_their_instructions():
    """Of the others there is a page each."""

    def room(day, **facts):
        return {"rows": [], "environment": {"driver": None, "date": day} | facts}

    devices = {"chip": {"room": room("2026-01-01")}, "chip-avx2": {"room": room("2026-01-02", restrained=True)}}
    assert report.cpu_results(devices)["room"]["environment"]["date"] == "2026-01-01"


def test_a_number_typed_into_a_document_is_found(monkeypatch, tmp_path, capsys):
    edited = tmp_path / "README.md"
    text = report.DOCUMENTS[0].read_text()
    edited.write_text(text.replace("959,843,008,512", "959,843,008,513", 1))
    assert edited.read_text() != text
    monkeypatch.setattr(report, "DOCUMENTS", (edited,))
    assert report.main(["--check"]) == 1 and "out of date: README.md" in capsys.readouterr().out


def test_a_row_survives_its_file_and_a_broken_one_is_refused(tmp_path):
    row = row_with(refused={"other": "why"}, peak_bytes={"ours": 1})
    write(tmp_path / "room.json", row)
    assert results.load_rooms(tmp_path)["room"]["rows"] == [row]
    with pytest.raises(ValueError, match="no time of peer"):
        Row.read(row.entry() | {"milliseconds": {"ours": row.milliseconds["ours"]}})
    with pytest.raises(ValueError, match="the time of ours is"):
        Row.read(row.entry() | {"milliseconds": row.milliseconds | {"ours": {"median": 1.0}}})


@pytest.mark.parametrize("job", TINY, ids=lambda job: job.case.op)
def test_every_candidate_is_timed_or_refused_with_a_reason(job):
    found = tiny_measurement(job)
    names = {*our_backends(job.case, CPU), *job.op.peers(job.case, CPU, False)}
    assert names == {n for n in found.timings if n not in ("copy", "matmul")} | set(found.refused)
    assert not found.wrong and all(found.refused.values())
    (row,) = found.rows
    assert row.best_peer in names and row.facts["rate"] > 0 and row.facts["ceiling"] > 0
    assert row.op in speed_table(found.rows)


def test_other_results_are_not_timed(monkeypatch):
    """Of ours: no row is left."""
    honest = ard_kernels.gate_residual_adaln

    def faulty(*args, **kwargs):
        h, y = honest(*args, **kwargs)
        return h, 1.001 * y

    monkeypatch.setattr(ard_kernels, "gate_residual_adaln", faulty)
    found = tiny_measurement(TINY[1])
    assert set(found.wrong) == {"cpu"} and not found.rows
    assert "differs from fp64 by 1" in found.wrong["cpu"]


def test_every_op_is_compared_on_every_device():
    assert {job.case.op for job in cpu_jobs()} == {job.case.op for job in gpu_jobs()}
    assert len({job.label for job in cpu_jobs()}) == len(cpu_jobs())
    label = "block_causal_attention B1 H16 S4 L256 D72 float32 M4 packed forward+backward"
    (model,) = [job for job in cpu_jobs() if job.label == label]
    # 10 of 16 tiles of 256 x 256; 2 matmuls forward, 5 backward; q, k, v, out, then twice as many
    work_of = model.op.work(model.case, model.direction)
    assert work_of == (7 * 2 * 16 * 72 * 10 * 256 * 256, 12 * 16 * 72 * 1024 * 4) and model.target == 1.3


@pytest.mark.slow
def test_the_claim_to_the_last_integer():
    table = design_table()
    assert all(entry["counted"] == entry["analytic"] for entry in table)
    counted = {entry["work"]: entry["counted"] for entry in table}
    assert counted["student sampling, N=6"] - counted["student, N=0 (4 forwards)"] == 10_871_635_968


def test_written_results_do_not_make_a_commit_dirty(monkeypatch, tmp_path):
    for name in ("benchmarks/results/cpu.json", "benchmarks/measure.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name, dirty in (("benchmarks/results/cpu.json", False), ("README.md", False), ("benchmarks/measure.py", True)):
        (tmp_path / name).write_text("after")
        assert environment.__wrapped__(CPU)["dirty"] is dirty, name


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
    assert environment.__wrapped__(torch.device("cuda"))["driver"] == "for CUDA 13.2"


def test_peak_memory_is_that_of_the_call():
    found = peak_bytes(lambda: torch.ones(25_000_000).add_(1), CPU)
    if found is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 95e6 < found < 150e6


def test_event_timer_queues_the_work_behind_a_pause(monkeypatch):
    """Order of what is sent to the GPU: pause, start event, the work, stop event."""
    sent = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            sent.append("event")

        def elapsed_time(self, other):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: sent.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: sent.append("pause"))
    assert EventTimer(torch.device("cuda", 0))(lambda: sent.append("work")) == 1.5
    assert sent == ["wait", "pause", "event", "work", "event", "wait"]


PLANTED = """
from functools import partial
from benchmarks.measure import Group, Measurement
from benchmarks.results import compared
from ard_kernels.tune.timing import Timing

timings = {name: Timing(tuple(x * (1 + i / 100) for i in range(9))) for name, x in (("ours", 2.0), ("fast", 3.0))}

def compare(wrong):
    print("measured")
    refused = {"absent": "ModuleNotFoundError: no such peer"}
    row = compared(timings, "ours", ["fast"], 1.2, op="op", shape="shape", direction="forward", refused=refused)
    return Measurement([row], timings, refused, {"odd": "differs"} if wrong else {})

GROUPS = [Group("group", ("ours", "fast", "absent", *(["odd"] if WRONG else [])), partial(compare, WRONG))]

def test_speed(group, candidate, report):
    report(group, candidate)

def test_facts(room):
    room.facts["counted"] = 7
"""


# Runs of pytest, each in a fork of a process that has imported what takes seconds.
RUNS = """
import json, os, sys
import pytest, torch
import benchmarks.measure, benchmarks.tables
for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        status = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_planted():
    """A benchmark run over one planted file: (folder, wrong, *arguments) -> (what it printed, result file or None)."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", RUNS], env=variables, text=True, bufsize=1, **pipes) as runs:

        def run(folder, wrong, *arguments):
            (folder / "bench_planted.py").write_text(f"WRONG = {wrong}\n{PLANTED}")
            (folder / "printed").unlink(missing_ok=True)
            command = ["-p", "benchmarks.conftest", "--rootdir", str(folder), "-rs", "-s"]
            command += ["-c", str(ROOT / "pyproject.toml"), "--results", str(folder / "out")]
            command += ["--benchmark-json", str(folder / "plugin.json"), *(arguments or [str(folder)])]
            runs.stdin.write(json.dumps([str(folder), command]) + "\n")
            assert runs.stdout.readline().strip() in ("0", "1")
            file = folder / "out" / "planted.json"
            return (folder / "printed").read_text(), json.loads(file.read_text()) if file.exists() else None

        yield run


@pytest.mark.slow
def test_a_run_writes_its_file_a_table_and_the_plugins_json(run_planted, tmp_path):
    text, content = run_planted(tmp_path, False)
    assert "3 passed, 1 skipped" in text, text
    assert "absent: ModuleNotFoundError: no such peer" in text, "a refused peer is named with its reason"
    assert "1.50x | 1.20x, met" in text
    assert content["counted"] == 7
    (row,) = content["rows"]
    assert row["ratio"] == pytest.approx(1.5) and row["milliseconds"]["ours"]["rounds"] == 9
    of_plugin = {e["name"]: e["stats"] for e in json.loads((tmp_path / "plugin.json").read_text())["benchmarks"]}
    for name, time in row["milliseconds"].items():
        assert of_plugin[name]["median"] == pytest.approx(time["median"] / 1e3) and of_plugin[name]["rounds"] == 9


@pytest.mark.slow
def test_a_run_of_a_part_or_with_a_wrong_candidate_writes_nothing(run_planted, tmp_path):
    text, content = run_planted(tmp_path, False, "-k", "fast", str(tmp_path))
    assert content is None and "not all of it was selected" in text
    text, content = run_planted(tmp_path, True)
    assert content is None and "1 failed" in text and "a test of it failed" in text
    text, content = run_planted(tmp_path, False, "--collect-only", str(tmp_path))
    assert content is None and "wrote" not in text


@pytest.mark.slow
def test_a_run_goes_on_behind_what_an_earlier_one_has_measured(run_planted, tmp_path):
    part = ["--partial", f"{tmp_path / 'bench_planted.py'}::test_speed"]
    text, content = run_planted(tmp_path, False, *part)
    assert content is None and "measured" in text and "not all of it was run" in text
    text, content = run_planted(tmp_path, False, "--partial", str(tmp_path))
    assert "measured\n" not in text and content["rows"][0]["ratio"] == pytest.approx(1.5)
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize(
    "new, spread, status", [(1.5, 0.01, 0), (1.44, 0.01, 0), (1.35, 0.01, 1), (1.35, 0.8, 0), (1.9, 0.01, 0)]
)
def test_compare_finds_a_regression_beyond_the_noise(tmp_path, capsys, new, spread, status):
    write(tmp_path / "old.json", row_with(1.5, spread))
    write(tmp_path / "new.json", row_with(new, spread), row_with(shape="another"))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == status
    text = capsys.readouterr().out
    assert ("SLOWER" in text) == bool(status) and "only in NEW: 1 rows, first op another" in text
    with pytest.raises(SystemExit, match="has no results"):
        compare.main([str(tmp_path / "missing"), str(tmp_path / "new.json")])


def test_a_report_without_a_peer_or_with_a_missed_goal(tmp_path):
    """What a GPU may leave: a baseline out of memory, a ratio met while the rate is missed."""
    alone, facts = {"ours": Timing((2.0, 2.1, 2.2))}, {"S": 4, "L": 64, "refused": {"published_eager": "memory"}}
    grown = compared(alone, "ours", [], 1.0, op="growth", shape="C72 S4 L64", direction="training", **facts)
    goals = [goal("times the fastest peer", 1.5, 1.3), goal("useful TFLOP/s", 400.0, 450.0)]
    slow = row_with(op="block_causal_attention", shape="B1 D72 M4 ", target=1.3, targets=goals)
    rooms = {"kernels": {"environment": environment(CPU) | {"driver": "580"}, "rows": [grown, slow]}}
    assert "1.30x, met; 450 useful TFLOP/s, missed" in report.measured({"gpu": rooms})
    rooms["kernels"]["environment"]["driver"] = None
    assert "| 1.30x; 450 useful TFLOP/s |   2.00 ms, **1.50x** peer |" in report.measured({"cpu": rooms})
    page = report.page("gpu", rooms, plots.draw("gpu", rooms, tmp_path))
    assert "published design, eager: memory" in page and "| **ours**" in page
    assert "growth" not in growth_table([grown]).splitlines()[-1]


def test_within_noise_is_less_than_the_noise():
    for spread, word in ((0.4, "missed, within noise"), (0.001, "missed")):
        assert word in speed_table([row_with(0.99, spread)])


def test_machines_stand_side_by_side():
    """Work that one of them did not do leaves a hole; two alternatives, or two targets, are two lines."""
    only, twice = {"op": "another"}, {"op": "again", "shape": "kept"}
    left = [row_with(1.5), row_with(0.8, **only), row_with(1.1, **twice), row_with(1.2, **twice)]
    rate = goal("samples/s", 2100.0, 2000.0)
    right = [
        row_with(1.3, **twice), row_with(0.99, 0.4), row_with(1.4, **twice), row_with(1.2, target=1.3, **only),
        row_with(0.5, targets=[rate]),
    ]  # fmt: skip
    lines = [line.replace(" ", "") for line in machines_table({"A": left, "B": right}).splitlines()]
    assert lines[0] == "|work|target|A|B|" and lines[2:] == [
        "|`op`shape,forward|1.00x|2.00ms,1.50xpeer|2.00ms,**0.99x**(withinnoise)peer|",
        "|`another`shape,forward|1.00x|2.00ms,**0.80x**peer||",
        "|`again`kept,forward|1.00x|2.00ms,1.10xpeer|2.00ms,1.30xpeer|",
        "|`again`kept,forward|1.00x|2.00ms,1.20xpeer|2.00ms,1.40xpeer|",
        "|`another`shape,forward|1.30x||2.00ms,**1.20x**peer|",
        "|`op`shape,forward|2000samples/s||2.00ms,0.50xpeer|",
    ]


def test_results_of_other_instructions_go_to_other_folders(monkeypatch):
    """One name may stand for several chips: of virtual machines "AMD EPYC" is all that is said."""
    monkeypatch.setattr(results, "DEVICE", CPU)
    folders = set()
    for isa, restrained in (("AVX2", None), ("AVX512", None), ("AVX2", "avx2")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda isa=isa: isa)
        monkeypatch.setattr(results.extension, "restrained_isa", lambda restrained=restrained: restrained)
        folders.add(results.results_folder().name)
    assert len(folders) == 3 and all("-threads-avx" in name for name in folders)


@pytest.mark.parametrize("way", ["sampling", "training"])
def test_overhead_and_growth_time_graphs_and_not_python(monkeypatch, way):
    made, timed = [], []

    def captured(run, device, pool):
        made.append(lambda: run())
        return made[-1]

    def interleaved(candidates, *arguments, **how):
        timed.extend(candidates.values())
        return {name: Timing((1.0, 1.0)) for name in candidates}

    monkeypatch.setattr(work, "captured", captured)
    monkeypatch.setattr(bench_history_overhead, "CONFIG", work.model_named("tiny"))
    for module in (bench_history_overhead, bench_growth):
        monkeypatch.setattr(module, "interleaved", interleaved)
    (row, *_) = bench_history_overhead.compare(way, 2, (0, 2), "M4").rows
    bench_growth.compare(way, 2, 16)
    assert timed == made and len(made) == 4 and row.facts["not_captured"] == {}


def test_a_published_design_that_does_not_fit_leaves_a_row_of_ours(monkeypatch):
    """And the candidates share the optimizer: its states are 5.4 GB of DiT-XL/2."""
    honest, training_step, optimizers = PublishedStudent.forward, work.training_step, []

    def out_of_memory(self, states, labels):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, states, labels)

    def noted(model, optimizer, *rest):
        optimizers.append(optimizer)
        return training_step(model, optimizer, *rest)

    monkeypatch.setattr(PublishedStudent, "forward", out_of_memory)
    monkeypatch.setattr(work, "training_step", noted)
    how = {"goals": {"published_eager": 2.0}, "compile_options": {}, "seconds": 1.0, "rounds": 2}
    (row,) = work.compare_training("tiny", work.model_named("tiny"), 1, CPU, **how).rows
    assert row.best_peer is None and not row.met and list(row.milliseconds) == ["ours"]
    assert "out of memory" in row.refused["published_eager"] and "none" in speed_table([row])
    assert len(optimizers) == 2 and optimizers[0] is optimizers[1]
