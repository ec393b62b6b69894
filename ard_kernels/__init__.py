"""ard-kernels: the ops of AutoRegressive Distillation (ARD, arXiv 2504.11295). Needs torch and numpy only."""

from ard_kernels import flops
from ard_kernels.block_causal_attention import (
    SegmentMask,
    block_causal_attention,
    block_causal_attention_packed,
    merge_attention,
    segment_attention,
    segment_attention_packed,
)
from ard_kernels.common.backends import BackendStatus, backends, use_backend
from ard_kernels.gelu import gelu
from ard_kernels.history_attention import HistoryCache, HistoryRouting, history_attention
from ard_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_packed
from ard_kernels.segment_adaln import adaln_modulate, gate_residual, gate_residual_adaln
from ard_kernels.version import __version__

__all__ = [
    "BackendStatus",
    "HistoryCache",
    "HistoryRouting",
    "SegmentMask",
    "__version__",
    "adaln_modulate",
    "backends",
    "block_causal_attention",
    "block_causal_attention_packed",
    "flops",
    "gate_residual",
    "gate_residual_adaln",
    "gelu",
    "history_attention",
    "merge_attention",
    "qk_norm_rope",
    "qk_norm_rope_packed",
    "segment_attention",
    "segment_attention_packed",
    "use_backend",
]
