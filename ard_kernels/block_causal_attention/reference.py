"""The slow oracle: dense masked softmax attention in fp64, for tests and benchmarks only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.common.arguments import check_scale


def block_causal_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    lengths: Sequence[int],
    window: int | None = None,
    sink: int = 0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T + mask) V and its log-sum-exp, all in fp64. Differentiable by autograd."""
    q, k, v = q_BHTD.double(), k_BHTD.double(), v_BHTD.double()
    scale = check_scale("reference", scale, q.shape[-1])
    mask_TT = dense_mask(lengths, q.shape[2], window, sink, q.device)
    scores_BHTT = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask_TT, -math.inf)
    return scores_BHTT.softmax(-1) @ v, scores_BHTT.logsumexp(-1)
