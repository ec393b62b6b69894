"""Scores of generated images: Frechet distance, endpoint error, class consistency. All sums are float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F) of a feature sample, float64."""

    mean_F: torch.Tensor
    covariance_FF: torch.Tensor
    count: int


def feature_statistics(features_NF: torch.Tensor) -> FeatureStatistics:
    """Statistics of features (N, F) of any float dtype; N >= 2, all finite."""
    if features_NF.ndim != 2 or features_NF.shape[0] < 2:
        raise ValueError(
            f"feature_statistics: features have shape {tuple(features_NF.shape)}; expected (N, F) with N >= 2"
        )
    features_NF = features_NF.detach().double()
    if not torch.isfinite(features_NF).all():
        raise ValueError("feature_statistics: features hold NaN or infinity; expected finite values")
    mean_F = features_NF.mean(dim=0)
    centred_NF = features_NF - mean_F
    covariance_FF = centred_NF.T @ centred_NF / (features_NF.shape[0] - 1)
    return FeatureStatistics(mean_F, covariance_FF, features_NF.shape[0])


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians (Frechet 1957; Heusel et al. 2017, eq. 6).

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

    The symmetric form needs eigenvalues of symmetric matrices only, so singular covariances (fewer samples than
    features, constant features) are no special case: their rounding-negative eigenvalues are clamped to zero.
    """
    if a.mean_F.shape != b.mean_F.shape:
        raise ValueError(
            f"frechet_distance: b has {b.mean_F.numel()} features; expected {a.mean_F.numel()}, the number a has"
        )
    eigenvalues_F, vectors_FF = torch.linalg.eigh(a.covariance_FF)
    root_a_FF = (vectors_FF * eigenvalues_F.clamp(min=0.0).sqrt()) @ vectors_FF.T
    product_FF = root_a_FF @ b.covariance_FF @ root_a_FF
    product_eigenvalues_F = torch.linalg.eigvalsh((product_FF + product_FF.T) / 2)
    trace_root = product_eigenvalues_F.clamp(min=0.0).sqrt().sum()
    distance = (
        (a.mean_F - b.mean_F).square().sum()
        + torch.trace(a.covariance_FF)
        + torch.trace(b.covariance_FF)
        - 2.0 * trace_root
    )
    return max(float(distance), 0.0)


def endpoint_mse(images: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean squared difference per element of two image batches of one shape (N, ch, h, w)."""
    if images.shape != targets.shape:
        raise ValueError(
            f"endpoint_mse: images have shape {tuple(images.shape)}; expected {tuple(targets.shape)}, that of targets"
        )
    return float((images.double() - targets.double()).square().mean())


def class_consistency(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Share of rows whose largest logit is their label."""
    if logits_NK.ndim != 2 or labels_N.shape != logits_NK.shape[:1]:
        raise ValueError(
            f"class_consistency: labels have shape {tuple(labels_N.shape)}; expected ({logits_NK.shape[0]},) "
            f"for logits {tuple(logits_NK.shape)}"
        )
    return float((logits_NK.argmax(dim=1) == labels_N).double().mean())
