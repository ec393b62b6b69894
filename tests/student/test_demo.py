"""`ard demo` end to end at a tiny size, its settings, and the digits' classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import matplotlib.image
import pytest
import torch
from ard import digits
from ard.checkpoint import load_student, load_teacher
from ard.config import build, merge, read_yaml
from ard.demo import DemoConfig, load_config, run_demo, summarize
from ard.model import DiT

TINY = {
    "classifier": {"steps": 40},
    "teacher": {"hidden_size": 16, "depth": 2, "num_heads": 2, "train": {"steps": 20, "batch_size": 16}},
    "trajectories": {"count": 60, "shard_size": 40, "batch_size": 20, "sampling_steps": 6, "keep": [3, 0]},
    "students": {"history_layers": [0, 1], "seeds": [0, 1], "train": {"steps": 8, "batch_size": 8, "log_every": 4}},
    "evaluation": {"count": 40, "batch_size": 25, "timing_batch_size": 4, "timing_repeats": 2},
}


def yaml_values() -> dict:
    values = read_yaml(files("ard") / "configs" / "digits.yaml")
    values.pop("quick")
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, quick=True, config=build(DemoConfig, merge(yaml_values(), TINY)))


def test_demo_writes_its_report(finished):
    out, path = finished
    assert path == out / "report.md"
    text = path.read_text()
    for part in ("Frechet distance", "Quick run", "N=0", "N=1", "40 images", "not FID", "torch"):
        assert part in text
    for image in ("grid.png", "losses.png"):
        pixels = matplotlib.image.imread(out / image)
        assert pixels.ndim == 3 and pixels.std() > 0
        assert f"({image})" in text


def test_demo_reports_every_run_and_the_ratios(finished):
    result = json.loads((finished[0] / "report.json").read_text())
    assert [(row["history_layers"], row["seed"]) for row in result["students"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for row in result["students"]:
        assert row["frechet_to_teacher"] > 0 and row["endpoint_mse"] > 0 and 0 <= row["class_consistency"] <= 1
    base, history = ([r["endpoint_mse"] for r in result["students"] if r["history_layers"] == n] for n in (0, 1))
    expected = sum(b / h for b, h in zip(base, history, strict=True)) / 2
    assert result["summary"]["baseline_over_student"]["1"]["endpoint_mse"]["mean"] == pytest.approx(expected)
    assert result["quick"] is True and 0 < result["classifier_held_out_accuracy"] <= 1
    teacher, plain, with_history = result["costs_per_image"]
    assert teacher["flops"] > plain["flops"] and with_history["flops"] > plain["flops"]
    # S(S-1)/2 = 1 pair of 16x16 tokens in one layer: 4 * L * L * C.
    assert with_history["flops"] - plain["flops"] == 4 * 16 * 16 * 16


def test_demo_leaves_no_pickle_and_no_temporary_file(finished):
    suffixes = {path.suffix for path in finished[0].rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".md", ".png", ".safetensors"}


def test_demo_weights_load_through_the_public_loaders(finished):
    out = finished[0]
    teacher = load_teacher(out / "teacher" / "ema.safetensors", num_heads=2)
    student = load_student(out / "student-n1-seed0" / "ema.safetensors", num_heads=2, history_layers=1)
    assert teacher.config == student.config == build(DemoConfig, merge(yaml_values(), TINY)).teacher.model()
    assert student.steps == 2


def test_demo_is_reproducible_and_reuses_its_trajectories(finished, tmp_path):
    out, _ = finished
    scores = json.loads((out / "report.json").read_text())["students"]
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}
    config = build(DemoConfig, merge(yaml_values(), TINY))
    run_demo(out, config=config)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")} == shards
    assert json.loads((out / "report.json").read_text())["students"] == scores
    assert "Quick run" not in (out / "report.md").read_text()


def test_shipped_settings_hold_to_the_comparison():
    for quick in (False, True):
        config = load_config(quick)
        assert config.students.history_layers[0] == 0 and max(config.students.history_layers) > 0
        assert config.evaluation.seed != config.trajectories.seed
        assert config.trajectories.keep[-1] == 0
        image, label = torch.zeros(1, *digits.IMAGE_SHAPE), torch.zeros(1, dtype=torch.int64)
        assert DiT(config.teacher.model())(image, label, label).shape == image.shape
    assert len(load_config().students.seeds) >= 3


def test_settings_refuse_what_would_make_the_comparison_void():
    config = load_config()
    with pytest.raises(ValueError, match=r"expected 0 first"):
        replace(config.students, history_layers=(2,))
    with pytest.raises(ValueError, match=r"students.seeds is empty"):
        replace(config.students, seeds=())
    with pytest.raises(ValueError, match=r"evaluation.seed is 1, as trajectories.seed"):
        replace(config, evaluation=replace(config.evaluation, seed=1))
    with pytest.raises(ValueError, match=r"'students.train.ema_decai'; did you mean 'students.train.ema_decay'"):
        build(DemoConfig, merge(yaml_values(), {"students": {"train": {"ema_decai": 0.9}}}))


def test_summary_pairs_runs_of_one_seed():
    rows = [
        {"history_layers": n, "seed": seed, "frechet_to_teacher": f, "endpoint_mse": f, "frechet_to_real": 1.0,
         "class_consistency": 1.0}
        for seed, n, f in ((0, 0, 8.0), (0, 2, 2.0), (1, 0, 9.0), (1, 2, 1.0))
    ]  # fmt: skip
    summary = summarize(rows, (0, 2))
    assert summary["baseline_over_student"]["2"]["frechet_to_teacher"] == {"mean": 6.5, "min": 4.0, "max": 9.0}
    assert summary["scores"]["0"]["endpoint_mse"] == {"mean": 8.5, "min": 8.0, "max": 9.0}


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


def test_classifier_recognises_held_out_digits():
    settings = digits.ClassifierConfig(steps=150)
    classifier, accuracy = digits.train_classifier(digits.load(), settings)
    assert accuracy > 0.93
    assert classifier.features(torch.zeros(3, 1, 8, 8)).shape == (3, digits.DigitClassifier.FEATURES)
