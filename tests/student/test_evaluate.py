"""Scores of files against files: values, names, what is refused. Digits are the real data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ard.data import digits
from ard.evaluation.evaluate import NO_IMAGES, distance_names, evaluate, open_images, samples_file, write_statistics
from ard.evaluation.features import Features, load_features
from ard.evaluation.metrics import feature_statistics, frechet_distance, precision_recall
from ard.storage.files import file_sha256, write_tensors
from ard.storage.images import to_uint8, write_npz

POOLED = load_features("pooled")


@pytest.fixture(scope="module")
def digit_features() -> Features:
    return load_features("digits")


def save(path, images: torch.Tensor, labels: torch.Tensor | None = None):
    """Images (n, c, h, w) in [-1, 1] to an .npz (as uint8) or a .safetensors."""
    if path.suffix == ".npz":
        write_npz(path, [to_uint8(images)], len(images), None if labels is None else labels.numpy())
    else:
        write_tensors(path, {"images": images} | ({} if labels is None else {"labels": labels}))
    return path


@pytest.fixture
def halves(tmp_path):
    """Paths of two halves of 1200 digits, and their images and labels."""
    data = digits.load()
    images, labels = data.train_images[:1200], data.train_labels[:1200]
    first = save(tmp_path / "first.npz", images[:600], labels[:600])
    return first, save(tmp_path / "second.npz", images[600:]), images, labels


def test_halves_of_the_digits_are_near_and_noise_is_far(halves, tmp_path, digit_features):
    first, second, _, _ = halves
    near = evaluate(first, second, features=digit_features)["metrics"]
    noise = save(tmp_path / "noise.npz", torch.rand(600, *digits.IMAGE_SHAPE) * 2 - 1)
    far = evaluate(noise, second, features=digit_features)["metrics"]
    assert far["frechet_distance"] > 20 * near["frechet_distance"]
    assert near["precision"] > 0.8 and near["recall"] > 0.8 and far["precision"] < 0.3 and far["recall"] < 0.1
    assert near["class_consistency"] > 0.95 and "class_consistency" not in far


def test_scores_are_those_of_the_metrics_at_any_batch_size(tmp_path):
    samples, reference = torch.randn(60, 2, 3, 3), torch.randn(70, 2, 3, 3) + 0.2  # more images than features
    paths = save(tmp_path / "a.safetensors", samples), save(tmp_path / "b.safetensors", reference)
    features = [POOLED.extract(images) for images in (samples, reference)]
    distance = frechet_distance(*map(feature_statistics, features))
    for batch_size in (1, 17, 256):
        metrics = evaluate(*paths, features=POOLED, batch_size=batch_size, neighbours=2)["metrics"]
        assert metrics.pop("frechet_distance") == pytest.approx(distance, rel=1e-9)
        assert metrics == dict(zip(("precision", "recall"), precision_recall(*features, k=2), strict=True))


def test_the_report_of_a_file(halves, tmp_path, digit_features):
    first, second, _, _ = halves
    result = evaluate(first, second, features=digit_features, neighbours=5, precision_recall_max=100)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["metrics"]) == {"frechet_distance", "precision", "recall", "class_consistency"}
    assert result["features"] == "digits"
    assert result["samples"] == {
        "path": "first.npz", "count": 600, "sha256": file_sha256(first), "image_shape": [1, 8, 8]
    }  # fmt: skip
    assert result["reference"] == {"file": "second.npz", "count": 600, "sha256": file_sha256(second)}
    assert result["settings"] == {
        "neighbours": 5,
        "precision_recall_samples": 100,
        "precision_recall_reference": 100,
        "precision_recall_reason": None,
    }


def test_precision_and_recall_take_rows_evenly_spaced_over_the_file(tmp_path):
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 1, 2, 2)
    samples, reference = save(tmp_path / "a.safetensors", images[:30]), save(tmp_path / "b.safetensors", images)
    used = [images[[(row * count) // 7 for row in range(7)]].flatten(1) for count in (30, 40)]
    expected = precision_recall(*used, k=1)
    for batch_size in (3, 64):
        result = evaluate(
            samples, reference, features=POOLED, batch_size=batch_size, neighbours=1, precision_recall_max=7
        )
        assert (result["metrics"]["precision"], result["metrics"]["recall"]) == expected
        assert result["settings"]["precision_recall_samples"] == 7


def test_npz_and_safetensors_of_the_same_images_score_the_same(halves, tmp_path):
    first, second, _, _ = halves
    images = torch.cat(list(open_images(first).batches(100)))
    floats = save(tmp_path / "first.safetensors", images)
    assert evaluate(first, second, features=POOLED)["metrics"] == evaluate(floats, second, features=POOLED)["metrics"]


def test_class_consistency_needs_labels_and_features_that_classify(halves, tmp_path, digit_features):
    _, second, images, labels = halves
    wrong = (labels[:600] + torch.arange(600) % 2) % 10  # every second label is another one
    samples = save(tmp_path / "labelled.safetensors", images[:600], wrong)
    assert evaluate(samples, second, features=digit_features)["metrics"]["class_consistency"] == pytest.approx(
        0.5, abs=0.02
    )
    assert "class_consistency" not in evaluate(samples, second, features=POOLED)["metrics"]


@pytest.mark.parametrize(
    "features, count, names",
    [
        ("pooled", 50_000, ["frechet_distance"]),
        ("digits", 50_000, ["frechet_distance"]),
        ("user.module:inception", 50_000, ["frechet_distance"]),
        ("inception", 49_999, ["frechet_distance", "fid"]),
        ("inception", 50_001, ["frechet_distance", "fid"]),
        ("inception", 50_000, ["frechet_distance", "fid", "fid_50k"]),
    ],
)
def test_only_inception_features_give_a_fid_and_only_50000_samples_fid_50k(features, count, names):
    assert distance_names(features, count, 1.5) == dict.fromkeys(names, 1.5)


def test_the_names_reach_the_report(tmp_path):
    pixels = save(tmp_path / "samples.npz", torch.zeros(50_000, 1, 1, 1))
    small = save(tmp_path / "small.npz", torch.zeros(60, 1, 1, 1))
    inception = Features("inception", lambda images: images.flatten(1))
    write_statistics(tmp_path / "statistics.npz", small, features=inception)
    full = evaluate(pixels, tmp_path / "statistics.npz", features=inception, batch_size=10_000)["metrics"]
    assert full["fid_50k"] == full["fid"] == full["frechet_distance"]
    fewer = evaluate(small, small, features=inception)["metrics"]
    assert "fid" in fewer and "fid_50k" not in fewer


def test_written_statistics_stand_for_their_images(halves, tmp_path):
    first, second, _, _ = halves
    written = write_statistics(tmp_path / "second-statistics.npz", second, features=POOLED, batch_size=128)
    with np.load(tmp_path / "second-statistics.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["count", "features", "mu", "sigma"]
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64 and int(arrays["count"]) == 600
        assert np.array_equal(arrays["sigma"], written.covariance_FF.numpy())
    by_statistics = evaluate(first, tmp_path / "second-statistics.npz", features=POOLED)
    by_images = evaluate(first, second, features=POOLED)
    assert by_statistics["metrics"]["frechet_distance"] == pytest.approx(by_images["metrics"]["frechet_distance"])
    assert by_statistics["metrics"]["precision"] is None and by_statistics["metrics"]["recall"] is None
    assert by_statistics["settings"]["precision_recall_reason"] == NO_IMAGES
    assert by_statistics["settings"]["precision_recall_samples"] == 0
    assert by_statistics["reference"]["count"] == 600
    with pytest.raises(ValueError, match=r"statistics of features 'pooled'; expected 'other'"):
        evaluate(first, tmp_path / "second-statistics.npz", features=Features("other", POOLED.extract))


def test_statistics_of_others_beside_their_images(halves, tmp_path):
    first, second, images, _ = halves
    wide = feature_statistics(POOLED.extract(images))
    np.savez(
        tmp_path / "both.npz",
        to_uint8(images[600:]),
        mu=wide.mean_F.numpy().astype(np.float32),
        sigma=wide.covariance_FF.numpy(),
    )
    result = evaluate(first, tmp_path / "both.npz", features=POOLED)
    own = feature_statistics(torch.cat([POOLED.extract(batch) for batch in open_images(first).batches(200)]))
    assert result["metrics"]["frechet_distance"] == pytest.approx(frechet_distance(own, wide), rel=1e-4)
    by_images = evaluate(first, second, features=POOLED)["metrics"]
    assert result["metrics"]["precision"] == by_images["precision"]
    assert result["metrics"]["recall"] == by_images["recall"]
    assert result["reference"]["count"] is None and result["settings"]["precision_recall_reference"] == 600


def statistics_file(path, mu, sigma):
    np.savez(path, **{name: array for name, array in (("mu", mu), ("sigma", sigma)) if array is not None})
    return path


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        (np.zeros(3), np.eye(3), r"reference's mu has 3 features; expected 16, as 'pooled' gives"),
        (np.zeros(16), np.eye(3), r"mu and sigma have shapes \(16,\) and \(3, 3\); expected \(F,\) and \(F, F\)"),
        (np.zeros(16), None, r"bad.npz: has no sigma"),
        (None, np.eye(16), r"bad.npz: has no mu"),
        (np.full(16, np.nan), np.eye(16), r"bad.npz: mu or sigma hold NaN or infinity"),
        (np.array([None]), np.eye(1), r"mu is object \(1,\), a pickle"),
        (np.zeros(16), -np.eye(16), r"the covariance of b .* has the eigenvalue -1; expected it symmetric"),
        (np.zeros(16), np.tri(16), r"the covariance of b differs from its transpose by 1 "),
        (np.zeros(0), np.zeros((0, 0)), r"reference's mu has 0 features; expected 16"),
    ],
)
def test_bad_statistics_are_refused(tmp_path, mu, sigma, message):
    samples = save(tmp_path / "samples.safetensors", torch.randn(5, 1, 4, 4))
    with pytest.raises(ValueError, match=message):
        evaluate(samples, statistics_file(tmp_path / "bad.npz", mu, sigma), features=POOLED)


class NeverCalled:
    """Features of which nothing may be computed."""

    name, classify = "never", None

    def extract(self, images):
        raise AssertionError("features were computed before the arguments were checked")


@pytest.mark.parametrize(
    "samples, reference, settings, message",
    [
        ((1, 1, 4, 4), (9, 1, 4, 4), {}, r"samples.safetensors: holds 1 images; expected at least 4"),
        ((3, 1, 4, 4), (9, 1, 4, 4), {}, r"holds 3 images; expected at least 4 \(more than the neighbours\)"),
        ((9, 1, 4, 4), (3, 1, 4, 4), {}, r"reference.safetensors: holds 3 images; expected at least 4"),
        ((1, 1, 4, 4), (9, 1, 4, 4), {"neighbours": 1}, r"holds 1 images; expected at least 2 \(a covariance"),
        ((9, 1, 4, 4), (9, 1, 4, 5), {}, r"reference.safetensors: .*\(1, 4, 5\); expected \(1, 4, 4\), the samples'"),
        ((9, 1, 4, 4), (9, 1, 4, 4), {"batch_size": 0}, r"batch_size=0"),
        ((9, 1, 4, 4), (9, 1, 4, 4), {"neighbours": 0}, r"neighbours=0"),
        ((9, 1, 4, 4), (9, 1, 4, 4), {"precision_recall_max": 3}, r"precision_recall_max=3"),
        ((9, 4, 4), (9, 1, 4, 4), {}, r"images are F32 \(9, 4, 4\); expected floating point \(N, c, h, w\)"),
    ],
)
def test_wrong_files_are_refused_before_any_work(tmp_path, samples, reference, settings, message):
    paths = [
        save(tmp_path / f"{name}.safetensors", torch.zeros(shape))
        for name, shape in (("samples", samples), ("reference", reference))
    ]
    with pytest.raises(ValueError, match=message):
        evaluate(*paths, features=NeverCalled(), **settings)


def test_one_sample_is_refused_against_statistics_too(tmp_path):
    samples = save(tmp_path / "samples.safetensors", torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"holds 1 images; expected at least 2"):
        evaluate(samples, statistics_file(tmp_path / "s.npz", np.zeros(16), np.eye(16)), features=NeverCalled())
    with pytest.raises(ValueError, match=r"holds 1 images; expected at least 2"):
        write_statistics(tmp_path / "out.npz", samples, features=NeverCalled())
    assert not (tmp_path / "out.npz").exists()


def test_non_finite_images_and_features_are_refused(tmp_path):
    images = torch.randn(9, 1, 4, 4)
    good = save(tmp_path / "good.safetensors", images)
    images[5, 0, 1, 1] = torch.inf
    bad = save(tmp_path / "bad.safetensors", images)
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=r"bad.safetensors: images 4 to 7 hold NaN or infinity"):
            evaluate(*pair, features=POOLED, batch_size=4)
    with pytest.raises(ValueError, match=r"features hold NaN or infinity"):
        evaluate(good, good, features=Features("nan", lambda images: images.flatten(1) / 0))


def test_other_files_are_refused(tmp_path):
    good = save(tmp_path / "good.safetensors", torch.randn(9, 1, 4, 4))
    write_tensors(tmp_path / "latents.safetensors", {"latents": torch.zeros(9, 1, 4, 4)})
    write_tensors(tmp_path / "labels.safetensors", {"images": torch.zeros(9, 1, 4, 4), "labels": torch.zeros(9)})
    write_tensors(tmp_path / "bytes.safetensors", {"images": torch.zeros(9, 1, 4, 4, dtype=torch.uint8)})
    statistics_file(tmp_path / "statistics.npz", np.zeros(16), np.eye(16))
    for name, message in (
        ("latents.safetensors", r"holds latents; expected images \(N, c, h, w\)"),
        ("labels.safetensors", r"labels are torch.float32 \(9,\); expected int64 \(9,\)"),
        ("bytes.safetensors", r"images are U8 .*; expected floating point"),
        ("statistics.npz", r"statistics.npz: holds mu, sigma; expected arr_0"),
        ("samples.pt", r"got 'samples.pt'; expected an .npz or a .safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / name, good, features=NeverCalled())
    with pytest.raises(ValueError, match=r"path is 'out.json'; expected a name that ends in .npz"):
        write_statistics(tmp_path / "out.json", good, features=NeverCalled())


@pytest.mark.parametrize(
    "text",
    ['{"file": "../victim.npz"}', '{"file": "/dev/zero"}', '{"file": ".."}', '{"file": ""}', '{"file": "a\\u0000b"}',
     '{"file": 1}', '{"file": "absent.npz"}', "{}", "[]", "", "[" * 100_000],
)  # fmt: skip
def test_sample_json_names_a_file_of_its_folder_or_is_refused(tmp_path, text):
    save(tmp_path / "victim.npz", torch.zeros(4, 1, 8, 8))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "sample.json").write_text(text)
    with pytest.raises(ValueError, match=r"samples/sample\.json"):
        samples_file(tmp_path / "samples")
    from command_line import ard

    result = ard("evaluate", str(tmp_path / "samples"), "--reference", "digits")
    assert result.exit_code == 1 and sum(line.startswith("ard: ") for line in result.output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "victim.npz"]


def test_samples_that_are_being_made_anew_are_refused(tmp_path):
    save(tmp_path / "samples.npz", torch.rand(8, 1, 8, 8))
    said = {"file": "samples.npz", "sha256": file_sha256(tmp_path / "samples.npz")}
    (tmp_path / "sample.json").write_text(json.dumps(said))
    (tmp_path / ".ard-parts").mkdir()
    with pytest.raises(ValueError, match=r"is unfinished: `ard sample` has begun in it anew"):
        samples_file(tmp_path)
    (tmp_path / ".ard-parts").rmdir()
    samples = samples_file(tmp_path)
    assert evaluate(samples, samples, features=POOLED)["samples"]["sha256"] == said["sha256"]
    save(samples, torch.rand(8, 1, 8, 8))
    with pytest.raises(ValueError, match=r"sample\.json: sha256 is .*; expected samples\.npz's"):
        evaluate(samples, samples, features=NeverCalled())


def test_nothing_is_left_beside_the_samples_but_the_scores(tmp_path):
    samples = save(tmp_path / "samples.npz", torch.rand(8, 1, 8, 8))
    from command_line import ard

    result = ard("evaluate", str(samples), "--reference", "digits")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "evaluate.json").read_text())["reference"]["file"] == "digits.npz"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluate.json", "samples.npz"]


def test_damaged_safetensors_and_lying_statistics_are_refused_by_name(tmp_path):
    samples = save(tmp_path / "samples.npz", torch.rand(8, 1, 8, 8))
    for content in (b"", b"short", samples.read_bytes()):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.safetensors is not a whole safetensors file"):
            evaluate(samples, tmp_path / "bad.safetensors", features=POOLED)
    for wrong in ({"count": 1}, {"count": "2"}, {"count": np.arange(3)}, {"features": 3}):
        np.savez(tmp_path / "bad.npz", **{"mu": np.zeros(64), "sigma": np.eye(64), **wrong})
        with pytest.raises(ValueError, match=rf"bad\.npz: {next(iter(wrong))} is"):
            evaluate(samples, tmp_path / "bad.npz", features=POOLED)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(64), sigma=np.full((64, 64), 1e308))
    with pytest.raises(ValueError, match=r"frechet_distance: the distance is (nan|inf); expected"):
        evaluate(samples, tmp_path / "bad.npz", features=POOLED)
    many = save(tmp_path / "many.npz", torch.rand(8, 33, 8, 8))
    with pytest.raises(ValueError, match=r"features 'pooled': images have 33 channels; expected at most 32"):
        evaluate(many, many, features=POOLED)
