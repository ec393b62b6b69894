"""Scores of generated images: Frechet distance, precision and recall, endpoint error, class consistency.

All sums and distances are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F) of a feature sample, float64."""

    mean_F: torch.Tensor
    covariance_FF: torch.Tensor
    count: int | None  # None: from a file that does not say


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


class FeatureAccumulator:
    """`feature_statistics` of a stream of batches, without storing the features.

    Keeps the count n, the mean m (F,) and the scatter M = sum (x - m)(x - m)^T (F, F) of what was seen, in float64.
    Two sets A and B merge by (Chan, Golub, LeVeque 1979, eq. 2.1), which never subtracts large sums:

        d = m_B - m_A,   m = m_A + d n_B / n,   M = M_A + M_B + d d^T n_A n_B / n
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_F, self.scatter_FF = torch.empty(0), torch.empty(0, 0)  # until there is a row

    def update(self, features_NF: torch.Tensor) -> None:
        """Adds features (N, F) of any float dtype, N >= 1, all finite."""
        if features_NF.ndim != 2 or features_NF.shape[0] < 1:
            raise ValueError(
                f"FeatureAccumulator.update: features have shape {tuple(features_NF.shape)}; expected (N, F), N >= 1"
            )
        features_NF = features_NF.detach().double()
        if not torch.isfinite(features_NF).all():
            raise ValueError("FeatureAccumulator.update: features hold NaN or infinity; expected finite values")
        batch = FeatureAccumulator()
        batch.count, batch.mean_F = features_NF.shape[0], features_NF.mean(dim=0)
        centred_NF = features_NF - batch.mean_F
        batch.scatter_FF = centred_NF.T @ centred_NF
        self.merge(batch)

    def merge(self, other: FeatureAccumulator) -> None:
        """Adds what ``other`` has seen; ``other`` stays as it is."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean_F, self.scatter_FF = other.count, other.mean_F.clone(), other.scatter_FF.clone()
            return
        if other.mean_F.shape != self.mean_F.shape:
            raise ValueError(
                f"FeatureAccumulator: got {other.mean_F.numel()} features; "
                f"expected {self.mean_F.numel()}, as in the earlier batches"
            )
        count = self.count + other.count
        delta_F = other.mean_F - self.mean_F
        self.mean_F += delta_F * (other.count / count)
        self.scatter_FF += other.scatter_FF
        self.scatter_FF.addr_(delta_F, delta_F, alpha=self.count * other.count / count)
        self.count = count

    def statistics(self) -> FeatureStatistics:
        """Statistics of everything seen, at least two rows."""
        if self.count < 2:
            raise ValueError(f"FeatureAccumulator.statistics: {self.count} rows were added; expected at least 2")
        return FeatureStatistics(self.mean_F.clone(), self.scatter_FF / (self.count - 1), self.count)


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
    for name, statistics in (("a", a), ("b", b)):
        _require_covariance(name, statistics.covariance_FF)
    try:
        eigenvalues_F, vectors_FF = torch.linalg.eigh(a.covariance_FF)
        root_a_FF = (vectors_FF * eigenvalues_F.clamp(min=0.0).sqrt()) @ vectors_FF.T
        product_FF = root_a_FF @ b.covariance_FF @ root_a_FF
        product_eigenvalues_F = torch.linalg.eigvalsh((product_FF + product_FF.T) / 2)
        trace_root = float(product_eigenvalues_F.clamp(min=0.0).sqrt().sum())
    except torch.linalg.LinAlgError:  # of numbers that are not finite, by some versions of LAPACK
        trace_root = math.nan
    means = (a.mean_F - b.mean_F).square().sum()
    distance = float(means + torch.trace(a.covariance_FF) + torch.trace(b.covariance_FF)) - 2.0 * trace_root
    if not math.isfinite(distance):
        raise ValueError(f"frechet_distance: the distance is {distance}; expected statistics whose products are finite")
    return max(distance, 0.0)


def _require_covariance(name: str, covariance_FF: torch.Tensor) -> None:
    """ValueError for what is no covariance: a distance to it can come out as 0. Rounding to float32 is far below."""
    try:
        least = float(torch.linalg.eigvalsh((covariance_FF + covariance_FF.T) / 2).min())
    except torch.linalg.LinAlgError:  # of numbers that are not finite, of which the distance is none either
        return
    asymmetry = float((covariance_FF - covariance_FF.T).abs().max())
    if asymmetry > 1e-4 * float(covariance_FF.abs().max()) or least < -1e-4 * float(covariance_FF.trace().abs()):
        raise ValueError(
            f"frechet_distance: the covariance of {name} differs from its transpose by {asymmetry:g} and has the "
            f"eigenvalue {least:g}; expected it symmetric and without negative eigenvalues"
        )


def precision_recall(
    generated_NF: torch.Tensor, reference_MF: torch.Tensor, k: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    The manifold of a set is the union of the balls around its points that reach to their k-th nearest neighbour, the
    point itself not counted. Precision is the share of generated points in the manifold of the reference, recall the
    share of reference points in the manifold of the generated ones; a point on a ball's surface is inside.

    generated_NF, reference_MF: any float dtype, one device, finite, N > k and M > k.
    chunk: rows per block of distances; memory is chunk * max(N, M) float64, the result does not depend on it.
    """
    sets = {"generated": generated_NF, "reference": reference_MF}
    if k < 1 or chunk < 1:
        raise ValueError(f"precision_recall: k={k}, chunk={chunk}; expected both >= 1")
    for name, features in sets.items():
        if features.ndim != 2 or features.shape[0] <= k or features.shape[1] != generated_NF.shape[-1]:
            raise ValueError(
                f"precision_recall: {name} has shape {tuple(features.shape)}; "
                f"expected more than k={k} rows of {generated_NF.shape[-1]} features"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"precision_recall: {name} holds NaN or infinity; expected finite values")
    generated_NF, reference_MF = generated_NF.detach().double(), reference_MF.detach().double()
    generated_radii_N = _neighbour_radii(generated_NF, k, chunk)
    reference_radii_M = _neighbour_radii(reference_MF, k, chunk)
    inside_reference = 0
    inside_generated_M = torch.zeros(len(reference_MF), dtype=torch.bool, device=reference_MF.device)
    for first in range(0, len(generated_NF), chunk):
        rows = slice(first, first + chunk)
        distances_RM = _distances(generated_NF[rows], reference_MF)
        inside_reference += int((distances_RM <= reference_radii_M).any(dim=1).sum())
        inside_generated_M |= (distances_RM <= generated_radii_N[rows, None]).any(dim=0)
    return inside_reference / len(generated_NF), float(inside_generated_M.double().mean())


def _neighbour_radii(features_NF: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row, (N,)."""
    radii = []
    for first in range(0, len(features_NF), chunk):
        distances_RN = _distances(features_NF[first : first + chunk], features_NF)
        distances_RN.diagonal(offset=first).fill_(float("inf"))
        radii.append(distances_RN.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _distances(a_RF: torch.Tensor, b_MF: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (R, M) by differences: |a|^2 + |b|^2 - 2ab would not give 0 for equal rows, and its rounding
    would depend on the chunk."""
    return torch.cdist(a_RF, b_MF, compute_mode="donot_use_mm_for_euclid_dist")


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
    if labels_N.numel() and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < logits_NK.shape[1]:
        raise ValueError(
            f"class_consistency: labels span [{int(labels_N.min())}, {int(labels_N.max())}]; expected classes of the "
            f"features, 0 to {logits_NK.shape[1] - 1}"
        )
    return float((logits_NK.argmax(dim=1) == labels_N).double().mean())
