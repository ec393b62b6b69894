"""Training losses of the student."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_mse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), at least float32; predictions, targets: (B, ...)."""
    if predictions.shape != targets.shape:
        raise ValueError(
            f"loss: targets are {tuple(targets.shape)}; expected the predictions' {tuple(predictions.shape)}"
        )
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return (predictions.to(dtype) - targets.to(dtype)).square().flatten(1).mean(dim=1)


def trajectory_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over segments of the MSE to the next state (arXiv 2504.11295): a scalar, at least float32.

    predictions, targets: (B, S, c, h, w). All segments have the same size, so the mean over segments of per-segment
    means is the mean over all elements.
    """
    return sample_mse(predictions, targets).mean()
