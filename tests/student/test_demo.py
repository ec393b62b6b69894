"""`ard demo` end to end at a tiny size, its settings, and the digits' classifier."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from ard.config.recipe import read_recipe
from ard.data import digits
from ard.models.dit import DiT
from ard.weights.opened import open_student, open_teacher

pytest.importorskip("yaml")
pictures = pytest.importorskip("matplotlib.image")

from ard.demo.run import load_config, run_demo, summarize  # noqa: E402
from ard.demo.students import Made, Stopwatch, make_trajectories  # noqa: E402
from ard.demo.workers import Workers  # noqa: E402

TINY = {
    "model": {"hidden_size": 16, "depth": 2, "num_heads": 2},
    "teacher": {"train": {"steps": 20, "batch_size": 16}},
    "trajectories": {"count": 300, "shard_size": 300, "sampling_steps": 6, "keep": [3, 0]},  # two parts for workers
    "distill": {"steps": 8, "batch_size": 8, "log_every": 4},
    "gan": {"start": 2, "train": {"steps": 4, "batch_size": 8, "log_every": 2}},
    "demo": {
        "teacher_threads": 1,
        "workers": 1,
        "classifier": {"steps": 40},
        "history_layers": [0, 1],
        "seeds": [0, 1],
        "evaluation": {"count": 40, "batch_size": 25, "timing_batch_size": 4, "timing_repeats": 2},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, quick=True, config=load_config(changes=TINY))


@pytest.mark.slow
def test_demo_writes_its_report(finished):
    out, path = finished
    assert path == out / "report.md"
    text = path.read_text()
    for part in ("Frechet distance", "Quick run", "N=0", "N=1", "N=1 + GAN", "40 images", "not FID", "torch"):
        assert part in text
    for image in ("grid.png", "losses.png"):
        pixels = pictures.imread(out / image)
        assert pixels.ndim == 3 and pixels.std() > 0
        assert f"({image})" in text


@pytest.mark.slow
def test_demo_reports_every_run_and_the_ratios(finished):
    result = json.loads((finished[0] / "report.json").read_text())
    names = ["N=0", "N=1", "N=1 + GAN"]
    assert [(row["sampler"], row["seed"]) for row in result["students"]] == [(n, s) for s in (0, 1) for n in names]
    for row in result["students"]:
        assert row["frechet_to_teacher"] > 0 and row["endpoint_mse"] > 0 and 0 <= row["class_consistency"] <= 1
    for name, other, metric in (("N=1", "N=0", "endpoint_mse"), ("N=1 + GAN", "N=1", "frechet_to_real")):
        base, own = ([row[metric] for row in result["students"] if row["sampler"] == n] for n in (other, name))
        ratios = result["summary"]["times_smaller"][name]
        expected = sum(b / o for b, o in zip(base, own, strict=True)) / 2
        assert ratios["over"] == other and ratios[metric]["mean"] == pytest.approx(expected)
    assert result["quick"] is True and 0 < result["classifier_held_out_accuracy"] <= 1
    teacher, plain, with_history = result["costs_per_image"]
    assert teacher["flops"] > plain["flops"] and with_history["flops"] > plain["flops"]
    # S(S-1)/2 = 1 pair of 16x16 tokens in one layer: 4 * L * L * C.
    assert with_history["flops"] - plain["flops"] == 4 * 16 * 16 * 16
    assert plain["times_baseline"] == 1 and with_history["times_baseline"] > 0 and teacher["seconds"] > 0


@pytest.mark.slow
def test_demo_leaves_no_pickle_and_no_temporary_file(finished):
    suffixes = {path.suffix for path in finished[0].rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".md", ".png", ".safetensors", ".yaml"}


@pytest.mark.slow
def test_demo_runs_open_as_sources(finished):
    out, recipe = finished[0], load_config(changes=TINY).recipe
    teacher, _ = open_teacher(out / "teacher", recipe.model)
    for run, layers in (("student-n0-seed1", 0), ("student-n1-seed0", 1), ("student-n1-gan-seed1", 1)):
        student, source = open_student(out / run, None)
        assert student.config == teacher.config and student.steps == 2
        assert student.routing.history_layers == layers == source.facts["student"]["history_layers"]


@pytest.mark.slow
def test_fine_tune_starts_from_the_student_and_changes_it(finished):
    before, after = (
        open_student(finished[0] / run, None, "model")[0] for run in ("student-n1-seed0", "student-n1-gan-seed0")
    )
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(changed) == len(changed) - 1  # all but the fixed positions


@pytest.mark.slow
def test_demo_has_the_same_bits_with_two_workers(finished, tmp_path):
    """Where another demo has been before: all but trajectories is made anew."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "trajectories")
    found = []
    changes = {**TINY, "demo": {**TINY["demo"], "workers": 2}}
    assert "Quick run" not in run_demo(tmp_path, config=load_config(changes=changes)).read_text()
    for workers, out in ((1, finished[0]), (2, tmp_path)):
        result = json.loads((out / "report.json").read_text())
        assert result["environment"]["workers"] == workers
        # torch's own generator is kept too, and nothing draws from it
        files = [path for path in out.rglob("*.safetensors") if path.stem != "rng"]
        tensors = {path.relative_to(out): path.read_bytes() for path in files}
        found.append((result["students"], result["teacher"], tensors))
    assert found[0] == found[1] and len(found[0][2]) > 10


@pytest.mark.slow
def test_trajectories_of_the_same_teacher_and_settings_are_made_once(finished):
    out, recipe = finished[0], load_config(changes=TINY).recipe
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}
    teacher, sha256 = open_teacher(out / "teacher", recipe.model)
    with Workers(1) as workers:
        made = Made(teacher, sha256, [], recipe)
        assert len(make_trajectories(made, out, Stopwatch(), workers)) == 300
        assert shards and {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")} == shards
        fewer = replace(recipe, trajectories=replace(recipe.trajectories, count=250, shard_size=250))
        assert len(make_trajectories(replace(made, recipe=fewer), out, Stopwatch(), workers)) == 250
    assert len(list(out.rglob("shard-*"))) > len(shards)


def test_shipped_settings_hold_to_the_comparison():
    for quick in (False, True):
        config = load_config(quick)
        assert config.demo.history_layers[0] == 0 and max(config.demo.history_layers) > 0
        assert config.demo.evaluation.seed != config.recipe.trajectories.seed
        assert config.recipe.trajectories.keep[-1] == 0
        image, label = torch.zeros(1, *digits.IMAGE_SHAPE), torch.zeros(1, dtype=torch.int64)
        assert DiT(config.recipe.model)(image, label, label).shape == image.shape
    assert len(load_config().demo.seeds) >= 3
    assert replace(load_config().recipe, preview=read_recipe("digits").preview) == read_recipe("digits")


def test_settings_refuse_what_would_make_the_comparison_void():
    config = load_config()
    with pytest.raises(ValueError, match=r"demo.history_layers is \[2\]; expected 0 first"):
        replace(config.demo, history_layers=(2,))
    with pytest.raises(ValueError, match=r"demo.seeds is empty"):
        replace(config.demo, seeds=())
    with pytest.raises(ValueError, match=r"demo.evaluation.seed is 1, as trajectories.seed"):
        load_config(changes={"demo": {"evaluation": {"seed": 1}}})
    with pytest.raises(ValueError, match=r"gan is missing"):
        replace(config, recipe=replace(config.recipe, gan=None))
    with pytest.raises(ValueError, match=r"'distill.ema_decai'; did you mean 'distill.ema_decay'"):
        load_config(changes={"distill": {"ema_decai": 0.9}})


def test_summary_pairs_runs_of_one_seed():
    rows = [
        {"sampler": name, "seed": seed, "frechet_to_teacher": f, "endpoint_mse": f, "frechet_to_real": real,
         "class_consistency": 1.0}
        for seed, name, f, real in (
            (0, "N=0", 8.0, 4.0), (0, "N=2", 2.0, 4.0), (0, "N=2 + GAN", 4.0, 1.0),
            (1, "N=0", 9.0, 4.0), (1, "N=2", 1.0, 6.0), (1, "N=2 + GAN", 4.0, 3.0),
        )
    ]  # fmt: skip
    summary = summarize(rows)
    assert summary["times_smaller"]["N=2"]["frechet_to_teacher"] == {"mean": 6.5, "min": 4.0, "max": 9.0}
    assert summary["times_smaller"]["N=2 + GAN"]["frechet_to_real"] == {"mean": 3.0, "min": 2.0, "max": 4.0}
    assert summary["times_smaller"]["N=2 + GAN"]["over"] == "N=2" and summary["times_smaller"]["N=2"]["over"] == "N=0"
    assert summary["scores"]["N=0"]["endpoint_mse"] == {"mean": 8.5, "min": 8.0, "max": 9.0}


def test_digits_are_the_real_scans_split_without_overlap():
    data = digits.load()
    images = torch.cat([data.train_images, data.held_out_images])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert len(data.held_out_labels) == 359
    assert torch.equal(digits.load().train_images, data.train_images)
    assert torch.bincount(torch.cat([data.train_labels, data.held_out_labels])).min() >= 174
    with pytest.raises(ValueError, match=r"held_out_share=1.0; expected between 0 and 1"):
        digits.load(1.0)
