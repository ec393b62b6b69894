"""Metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from ard.metrics import FeatureStatistics, class_consistency, endpoint_mse, feature_statistics, frechet_distance

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
