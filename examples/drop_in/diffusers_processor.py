"""An attention processor for the Wan models of diffusers: frames see one another as a SegmentMask says.

    model = WanTransformer3DModel.from_pretrained(...)
    use_segment_mask(model, SegmentMask.block_causal(frames, window=4, sink=1), tokens_per_frame)

Self-attention then is causal over frames, at the cost of the pairs that the mask keeps; cross attention sees the whole
text.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel

from ard_kernels import SegmentMask, qk_norm_rope, segment_attention

EVERYTHING = SegmentMask([[True]])


class SegmentProcessor:
    """mask: who sees whom, in segments of `segment_length` tokens; None: every query sees every key."""

    def __init__(self, mask: SegmentMask | None = None, segment_length: int | None = None):
        self.mask, self.segment_length = mask, segment_length

    def __call__(self, attn: WanAttention, x, context=None, attention_mask=None, rotary_emb=None) -> torch.Tensor:
        if attention_mask is not None or attn.add_k_proj is not None:
            raise NotImplementedError("SegmentProcessor takes no attention_mask and no image keys (image to video)")
        context = x if context is None else context
        q, k, v = (
            linear(tokens).unflatten(-1, (attn.heads, -1))
            for linear, tokens in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        settings = {"norm": "rms", "over": "all", "eps": attn.norm_q.eps, "layout": "bthd"}
        if rotary_emb is None:  # cross attention: k is of other tokens than q
            q = qk_norm_rope(q, q_weight=attn.norm_q.weight, **settings)
            k = qk_norm_rope(k, q_weight=attn.norm_k.weight, **settings)
        else:
            # diffusers repeats each angle for both elements of a pair: (1, T, 1, D); the op takes it once: (T, D/2).
            cos, sin = (table[0, :, 0, ::2] for table in rotary_emb)
            weights = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight}
            q, k = qk_norm_rope(q, k, cos, sin, **weights, **settings)
        lengths = (q.shape[1], k.shape[1]) if self.mask is None else (self.segment_length, self.segment_length)
        mask = EVERYTHING if self.mask is None else self.mask
        out = segment_attention(q, k, v, mask, segment_length=lengths[0], key_segment_length=lengths[1], layout="bthd")
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def use_segment_mask(model: WanTransformer3DModel, mask: SegmentMask, segment_length: int) -> None:
    """Every self-attention of `model` under `mask`, every cross attention whole, all of it through ard_kernels."""
    for block in model.blocks:
        block.attn1.set_processor(SegmentProcessor(mask, segment_length))
        block.attn2.set_processor(SegmentProcessor())
