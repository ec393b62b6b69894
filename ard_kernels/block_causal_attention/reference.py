"""The slow oracle: dense masked softmax attention in fp64, for tests and benchmarks only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.common.arguments import check_scale


def segment_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    sees: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T where `sees` (T_q, T_k), -inf elsewhere) V and its log-sum-exp, all in fp64.

    Query head h reads the key head h // (H / H_kv); rows that see nothing are 0 and -inf. Differentiable by autograd.
    """
    scale = check_scale("reference", scale, q_BHTD.shape[-1])
    group = q_BHTD.shape[1] // max(1, k_BHTD.shape[1])
    q, k, v = q_BHTD.double(), *(x.double().repeat_interleave(group, 1) for x in (k_BHTD, v_BHTD))
    blind = ~sees.any(-1)
    # Rows that see nothing take all keys, and then lose what they got: a softmax of -inf has gradients of NaN.
    scores_BHTT = (q @ k.transpose(-1, -2) * scale).masked_fill(~(sees | blind[:, None]), -math.inf)
    out, lse = scores_BHTT.softmax(-1) @ v, scores_BHTT.logsumexp(-1)
    return out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, -math.inf)


def block_causal_attention(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    lengths: Sequence[int],
    window: int | None = None,
    sink: int = 0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`segment_attention` with a block-causal mask."""
    sees = dense_mask(lengths, q_BHTD.shape[2], window, sink, q_BHTD.device)
    return segment_attention(q_BHTD, k_BHTD, v_BHTD, sees, scale)
