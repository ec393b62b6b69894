"""The student as its public re-implementation computes it, in plain eager PyTorch: the baseline of our speed claims.

Same weights and results as `ard.student.ARDStudent`, other work: the adaLN linears run on all T tokens (only S rows are
distinct), every layer attends densely over T x T under an additive float mask, residual, norm and modulation are
separate ops. One training forward of DiT-XL/2 costs 1.59x the FLOPs of four teacher forwards that way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ard.student import ARDStudent
from torch import Tensor, nn

from ard_kernels.block_causal_attention.spec import dense_mask


class PublishedStudent(nn.Module):
    """Wraps an ARDStudent's modules (its weights) with the published forward."""

    def __init__(self, student: ARDStudent):
        super().__init__()
        self.student = student
        L, T = student.config.tokens, student.steps * student.config.tokens
        routing, device = student.routing, student.pos_embed.device
        for name, mask in (
            ("history_mask", dense_mask([L], T, routing.window, routing.sink, device)),
            ("own_mask", dense_mask([L], T, 1, 0, device)),
        ):
            additive = torch.zeros(T, T, device=device).masked_fill(~mask, float("-inf"))
            self.register_buffer(name, additive, persistent=False)

    def forward(self, states_BSchw: Tensor, labels_B: Tensor) -> Tensor:
        """(B, S, c, h, w), (B,) -> predictions (B, S, c, h, w), as ARDStudent.forward."""
        student = self.student
        S, L = student.steps, student.config.tokens
        x_BTC = student.embed(states_BSchw)
        t_ST = student.timesteps(S, x_BTC.device)
        c_BTC = student.condition(t_ST, labels_B).repeat_interleave(L, dim=1)
        for layer, block in enumerate(student.blocks):
            mask = self.history_mask if layer < student.routing.history_layers else self.own_mask
            x_BTC = self.block(block, x_BTC, c_BTC, mask)
        tokens = []
        for s, final in enumerate(student.final_layers):
            shift, scale = final.adaLN_modulation(c_BTC[:, s * L : (s + 1) * L]).chunk(2, dim=-1)
            tokens.append(final.linear(modulate(x_BTC[:, s * L : (s + 1) * L], shift, scale)))
        return student.unpatchify(torch.stack(tokens, dim=1), student.config.in_channels)

    @staticmethod
    def block(block: nn.Module, x_BTC: Tensor, c_BTC: Tensor, mask_TT: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c_BTC).chunk(6, dim=-1)

        def attend(qkv_BT3HD: Tensor) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in qkv_BT3HD.unbind(2))
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask_TT).transpose(1, 2)

        x_BTC = x_BTC + gate_a * block.attn(modulate(x_BTC, shift_a, scale_a), attend)
        return x_BTC + gate_m * block.mlp(modulate(x_BTC, shift_m, scale_m))


def modulate(x_BTC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor) -> Tensor:
    return F.layer_norm(x_BTC, x_BTC.shape[-1:], eps=1e-6) * (1 + scale_BTC) + shift_BTC
