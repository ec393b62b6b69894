"""Metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from ard.evaluation.metrics import (
    FeatureAccumulator,
    FeatureStatistics,
    class_consistency,
    endpoint_mse,
    feature_statistics,
    frechet_distance,
    precision_recall,
)

EPS = torch.finfo(torch.float64).eps


def gaussian(mean, covariance) -> FeatureStatistics:
    mean_F = torch.tensor(mean, dtype=torch.float64)
    return FeatureStatistics(mean_F, torch.as_tensor(covariance, dtype=torch.float64), 100)


def random_covariance(features: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(features, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T


def test_statistics_are_mean_and_unbiased_covariance():
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    statistics = feature_statistics(features)
    torch.testing.assert_close(statistics.mean_F, features.double().mean(0))
    torch.testing.assert_close(statistics.covariance_FF, features.double().T.cov())
    assert statistics.count == 50


def test_frechet_of_one_dimension():
    # (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([-2.0], [[9.0]])) == pytest.approx(9.0 + 1.0, rel=1e-12)


def test_frechet_of_diagonal_covariances():
    a = gaussian([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 0.25])))
    b = gaussian([0.0, 3.0, 2.0], torch.diag(torch.tensor([9.0, 4.0, 1.0])))
    assert frechet_distance(a, b) == pytest.approx(4.0 + (1 - 3) ** 2 + (0.5 - 1) ** 2, rel=1e-12)


def test_frechet_of_commuting_covariances_in_a_rotated_basis():
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    s1, s2 = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double(), torch.tensor([2.0, 0.0, 1.0, 7.0, 5.0]).double()
    a = gaussian([0.0] * 5, basis @ torch.diag(s1**2) @ basis.T)
    b = gaussian([0.0] * 5, basis @ torch.diag(s2**2) @ basis.T)
    # An eigenvalue of 0 comes out as eps * |C|, its root as sqrt(eps) * |C|^1/2: the error of a singular case.
    assert frechet_distance(a, b) == pytest.approx(float((s1 - s2).square().sum()), abs=49 * EPS**0.5)


def test_frechet_of_two_by_two_covariances():
    # For 2x2 A, B: tr((A^1/2 B A^1/2)^1/2) = sqrt(tr(AB) + 2 sqrt(det A det B))
    a_FF, b_FF = random_covariance(2, 2, 2), random_covariance(2, 2, 3)
    root = math.sqrt(float(torch.trace(a_FF @ b_FF)) + 2 * math.sqrt(float(a_FF.det() * b_FF.det())))
    expected = float(a_FF.trace() + b_FF.trace()) - 2 * root
    assert frechet_distance(gaussian([0.0, 0.0], a_FF), gaussian([0.0, 0.0], b_FF)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 3, 16])
def test_frechet_to_itself_is_zero_even_when_singular(rank):
    covariance = random_covariance(16, rank, 4)
    same = gaussian([0.5] * 16, covariance)
    # The root of a rounding error of eps * |C| in an eigenvalue of C.
    floor = 16 * math.sqrt(EPS) * float(covariance.diagonal().sum())
    assert frechet_distance(same, same) <= floor


def test_frechet_with_one_point_mass():
    # One covariance is 0: what is left is the other's trace and the means.
    covariance = random_covariance(6, 6, 5)
    point = gaussian([1.0] * 6, torch.zeros(6, 6))
    for pair in ((point, gaussian([0.0] * 6, covariance)), (gaussian([0.0] * 6, covariance), point)):
        assert frechet_distance(*pair) == pytest.approx(6.0 + float(covariance.trace()), rel=1e-7)


def test_frechet_is_symmetric_and_finite_with_fewer_samples_than_features():
    generator = torch.Generator().manual_seed(6)
    a = feature_statistics(torch.randn(5, 32, generator=generator))
    b = feature_statistics(torch.randn(9, 32, generator=generator) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert math.isfinite(frechet_distance(a, b)) and frechet_distance(a, b) > 0


def test_frechet_refuses_other_sizes_and_bad_features():
    with pytest.raises(ValueError, match=r"b has 2 features; expected 1"):
        frechet_distance(gaussian([0.0], [[1.0]]), gaussian([0.0, 0.0], torch.eye(2)))
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(N, F\) with N >= 2"):
        feature_statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"hold NaN or infinity"):
        feature_statistics(torch.full((4, 3), math.nan))


def test_endpoint_mse():
    images = torch.zeros(2, 1, 2, 2)
    targets = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert endpoint_mse(images, targets) == pytest.approx(2.5)
    with pytest.raises(ValueError, match=r"images have shape \(2, 1, 2, 2\); expected \(2, 1, 2, 1\)"):
        endpoint_mse(images, targets[..., :1])


def test_class_consistency():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert class_consistency(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); expected \(4,\)"):
        class_consistency(logits, torch.tensor([0, 1, 1]))
    for label in (-1, 2):
        with pytest.raises(ValueError, match=r"labels span .*; expected classes of the features, 0 to 1"):
            class_consistency(logits, torch.tensor([0, 1, 1, label]))


def badly_centred(rows: int = 500, features: int = 6) -> torch.Tensor:
    """Mean 1e6, deviation 1: a sum of squares loses 12 of its 16 digits."""
    return 1e6 + torch.randn(rows, features, dtype=torch.float64)


def assert_same_statistics(actual: FeatureStatistics, expected: FeatureStatistics):
    assert actual.count == expected.count
    torch.testing.assert_close(actual.mean_F, expected.mean_F, rtol=1e-14, atol=0)
    scale = float(expected.covariance_FF.abs().max())
    torch.testing.assert_close(actual.covariance_FF, expected.covariance_FF, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("batch_size", [1, 7, 256, 500])
def test_accumulated_statistics_are_those_of_all_rows(batch_size):
    features = badly_centred()
    accumulator = FeatureAccumulator()
    for batch in features.split(batch_size):
        accumulator.update(batch)
    assert_same_statistics(accumulator.statistics(), feature_statistics(features))


def test_merged_accumulators_are_one():
    features = badly_centred()
    features[:100] += 50.0  # the parts have means of their own
    parts = [FeatureAccumulator() for _ in range(3)]
    for part, rows in zip(parts, features.split([100, 399, 1]), strict=True):
        part.update(rows)
    whole = FeatureAccumulator()
    whole.merge(FeatureAccumulator())
    for part in parts:
        whole.merge(part)
    assert_same_statistics(whole.statistics(), feature_statistics(features))
    assert_same_statistics(parts[0].statistics(), feature_statistics(features[:100]))


def test_accumulated_statistics_do_not_change_later():
    accumulator = FeatureAccumulator()
    accumulator.update(torch.tensor([[0.0], [2.0]]))
    early = accumulator.statistics()
    accumulator.update(torch.tensor([[100.0]]))
    assert early.mean_F.tolist() == [1.0] and early.covariance_FF.tolist() == [[2.0]] and early.count == 2


def test_accumulator_refuses_bad_features_and_keeps_what_it_has():
    accumulator = FeatureAccumulator()
    with pytest.raises(ValueError, match=r"0 rows were added; expected at least 2"):
        accumulator.statistics()
    accumulator.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.bfloat16))
    for features, message in (
        (torch.zeros(2), r"shape \(2,\); expected \(N, F\), N >= 1"),
        (torch.zeros(0, 2), r"shape \(0, 2\); expected \(N, F\), N >= 1"),
        (torch.zeros(1, 3), r"got 3 features; expected 2, as in the earlier batches"),
        (torch.full((1, 2), math.inf), r"hold NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            accumulator.update(features)
    assert accumulator.statistics().mean_F.tolist() == [1.0, 1.0] and accumulator.count == 2


def precision_recall_by_loops(generated, reference, k):
    """The definition in pure Python."""

    def radii(points):
        return [
            sorted(math.dist(point, other) for j, other in enumerate(points) if j != i)[k - 1]
            for i, point in enumerate(points)
        ]

    def share_inside(points, centres):
        balls = list(zip(centres, radii(centres), strict=True))
        return sum(any(math.dist(point, c) <= r for c, r in balls) for point in points) / len(points)

    return share_inside(generated, reference), share_inside(reference, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("whole_numbers", [False, True], ids=["random", "ties"])
def test_precision_and_recall_are_their_definition_at_any_chunk(k, whole_numbers):
    generated, reference = torch.randn(23, 2, dtype=torch.float64), 0.6 + 1.2 * torch.randn(31, 2, dtype=torch.float64)
    if whole_numbers:  # equal points, and points on a ball's surface
        generated, reference = (2 * generated).round(), (2 * reference).round()
    expected = precision_recall_by_loops(generated.tolist(), reference.tolist(), k)
    assert all(0.0 < score < 1.0 for score in expected)
    for chunk in (1, 5, 23, 1024):
        assert precision_recall(generated, reference, k=k, chunk=chunk) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_far_from_the_origin():
    # |a|^2 + |b|^2 - 2ab would lose these distances; the differences are exact.
    generated, reference = (2 * torch.randn(20, 2).double()).round(), (2 * torch.randn(30, 2).double()).round()
    expected = precision_recall_by_loops(generated.tolist(), reference.tolist(), 1)
    assert precision_recall(generated + 2.0**27, reference + 2.0**27, k=1) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_of_identical_and_of_disjoint_sets():
    features = torch.randn(40, 5)
    features[:10] = features[0]  # ten equal points have radius 0
    assert precision_recall(features, features[torch.randperm(40)], chunk=7) == (1.0, 1.0)
    assert precision_recall(features, features + 1000.0) == (0.0, 0.0)


def test_a_collapsed_sampler_has_precision_and_no_recall():
    reference = torch.randn(200, 3)
    collapsed = reference[0] + 1e-3 * torch.randn(50, 3)
    precision, recall = precision_recall(collapsed, reference)
    assert precision == 1.0 and recall <= 1 / 200


def test_precision_recall_refuses_bad_sets():
    good = torch.randn(8, 2)
    for generated, reference, k, message in (
        (good[:3], good, 3, r"generated has shape \(3, 2\); expected more than k=3 rows of 2 features"),
        (good, good[:3], 3, r"reference has shape \(3, 2\); expected more than k=3 rows"),
        (good, torch.zeros(8, 3), 3, r"reference has shape \(8, 3\); expected more than k=3 rows of 2 features"),
        (good, good * math.nan, 3, r"reference holds NaN or infinity"),
        (good, good, 0, r"k=0, chunk=1024; expected both >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(generated, reference, k=k)
