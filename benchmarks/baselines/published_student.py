"""The student as its public re-implementation computes it, in plain eager PyTorch: the baseline of our speed claims.

Same weights and results as `ard.ARDStudent`, other work: the adaLN linears run on all tokens (only one row per
segment is distinct), training attends densely over T x T under an additive float mask in every layer, sampling grows
its keys and values with `cat`, and residual, norm and modulation are separate ops. For DiT-XL/2 one training forward
costs 1.59x the FLOPs of four teacher forwards that way, sampling 1.50x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ard.models.dit import DiTConfig
from ard.models.student import ARDStudent
from ard.models.trunk import FinalLayer
from torch import Tensor, nn

from ard_kernels import flops
from ard_kernels.block_causal_attention.spec import dense_mask

Attend = Callable[[Tensor], Tensor]  # qkv (B, T, 3, H, D) -> (B, T, H, D)


class PublishedStudent(nn.Module):
    """Wraps an ARDStudent's modules (its weights) with the published forward and sampling."""

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
        t_1S = student.timesteps(S, x_BTC.device)
        c_BTC = student.condition(t_1S, labels_B).repeat_interleave(L, dim=1)
        for layer, block in enumerate(student.blocks):
            mask_TT = self.history_mask if layer < student.routing.history_layers else self.own_mask
            x_BTC = transformer_block(block, x_BTC, c_BTC, lambda qkv, mask=mask_TT: dense_attention(qkv, mask))
        tokens = [
            final_tokens(final, x_BTC[:, s * L : (s + 1) * L], c_BTC[:, s * L : (s + 1) * L])
            for s, final in enumerate(student.final_layers)
        ]
        return student.unpatchify(torch.stack(tokens, dim=1), student.config.in_channels)

    @torch.no_grad()
    def sample(self, noise_Bchw: Tensor, labels_B: Tensor) -> Tensor:
        """(B, c, h, w), (B,) -> all predictions (B, S, c, h, w), as ARDStudent.sample with the block-causal mask."""
        student, L = self.student, self.student.config.tokens
        if (student.routing.window, student.routing.sink) != (None, 0):
            raise ValueError("PublishedStudent.sample: the student has a window; expected the block-causal mask")
        times_1S = student.timesteps(student.steps, noise_Bchw.device)
        grown: list[tuple[Tensor, Tensor] | None] = [None] * student.routing.history_layers

        def attend(layer: int, qkv_BT3HD: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv_BT3HD.unbind(2))
            if layer < len(grown):
                if grown[layer] is not None:
                    k, v = (torch.cat([old, new], dim=2) for old, new in zip(grown[layer], (k, v), strict=True))
                grown[layer] = (k, v)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        state_Bchw, predictions = noise_Bchw, []
        for s, final in enumerate(student.final_layers):
            x_BLC = student.embed(state_Bchw[:, None])
            c_BLC = student.condition(times_1S[:, s : s + 1], labels_B).repeat_interleave(L, dim=1)
            for layer, block in enumerate(student.blocks):
                x_BLC = transformer_block(block, x_BLC, c_BLC, lambda qkv, layer=layer: attend(layer, qkv))
            tokens_BLP = final_tokens(final, x_BLC, c_BLC)
            state_Bchw = student.unpatchify(tokens_BLP[:, None], student.config.in_channels)[:, 0]
            predictions.append(state_Bchw)
        return torch.stack(predictions, dim=1)


def dense_attention(qkv_BT3HD: Tensor, mask_TT: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in qkv_BT3HD.unbind(2))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask_TT).transpose(1, 2)


def transformer_block(block: nn.Module, x_BTC: Tensor, c_BTC: Tensor, attend: Attend) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c_BTC).chunk(6, dim=-1)
    x_BTC = x_BTC + gate_a * block.attn(modulate(x_BTC, shift_a, scale_a), attend)
    return x_BTC + gate_m * block.mlp(modulate(x_BTC, shift_m, scale_m))


def final_tokens(final: FinalLayer, x_BTC: Tensor, c_BTC: Tensor) -> Tensor:
    shift, scale = final.adaLN_modulation(c_BTC).chunk(2, dim=-1)
    return final.linear(modulate(x_BTC, shift, scale))


def modulate(x_BTC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor) -> Tensor:
    return F.layer_norm(x_BTC, x_BTC.shape[-1:], eps=1e-6) * (1 + scale_BTC) + shift_BTC


def sampling_flops(config: DiTConfig, steps: int, history_layers: int) -> int:
    """FLOPs of `sample`: the student's, and the adaLN linears on L rows of a segment where one is distinct."""
    return flops.student_sampling(config, steps, history_layers) + repeated_rows_flops(config, steps)


def training_flops(config: DiTConfig, steps: int) -> int:
    """FLOPs of one forward: the adaLN linears on all tokens, and T x T attention in every layer."""
    L, C, T = config.tokens, config.hidden_size, steps * config.tokens
    dense = config.depth * (flops.attention(T, T, C) - steps * flops.attention(L, L, C))
    return flops.baseline_sampling(config, steps) + dense + repeated_rows_flops(config, steps)


def repeated_rows_flops(config: DiTConfig, steps: int) -> int:
    C = config.hidden_size
    return steps * (config.tokens - 1) * (config.depth * 2 * C * 6 * C + 2 * C * 2 * C)
