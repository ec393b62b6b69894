"""Training losses of the student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def trajectory_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over segments of the MSE to the next state (arXiv 2504.11295): a scalar, at least float32.

    predictions, targets: (B, S, c, h, w). All segments have the same size, so the mean over segments of per-segment
    means is the mean over all elements.
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"trajectory_loss: targets are {tuple(targets.shape)}; expected the predictions' {tuple(predictions.shape)}"
        )
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return F.mse_loss(predictions.to(dtype), targets.to(dtype))
