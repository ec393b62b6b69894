"""Analytic FLOPs of DiT, the ARD student and its baselines: 2 per multiply-add of conv, linear and attention, batch 1.

The numbers equal what `torch.utils.flop_counter.FlopCounterMode` counts on the models of `ard`, to the last integer.
A config is any object with the attributes of `ModelShape`.
"""

from __future__ import annotations

from typing import Protocol

from ard_kernels.block_causal_attention.spec import check_window, useful_pairs


class ModelShape(Protocol):
    """What the counts need to know of a diffusion transformer (DiT, arXiv 2212.09748)."""

    @property
    def patch_size(self) -> int: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...  # 2 * in_channels with learned sigma

    @property
    def tokens(self) -> int: ...  # L, per segment

    @property
    def hidden_size(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def mlp_weights(self) -> int: ...  # of a block's MLP: 2 * hidden_size * its width, with SwiGLU 3 times

    @property
    def modulation_flops(
        self,
    ) -> int: ...  # of a segment's rows; DiT: 2 * C * 6C in each block, 2 * C * 2C at the end

    @property
    def other_flops(self) -> int: ...  # of one segment, beside the parts that are counted here

    @property
    def context_flops(self) -> int: ...  # of a sample, once for all its segments: keys and values of text

    @property
    def frequency_embedding_size(self) -> int: ...  # sinusoidal features of the timestep


def attention(tokens: int, segment_length: int, width: int, window: int | None = None, sink: int = 0) -> int:
    """One attention layer, Q K^T and P V, over exactly the (query, key) pairs of the mask."""
    return 4 * width * useful_pairs([segment_length], tokens, window, sink)


def segment_forward(config: ModelShape) -> int:
    """All that the L tokens of one segment take, without history."""
    L, C, p = config.tokens, config.hidden_size, config.patch_size
    patch_embed = 2 * L * C * config.in_channels * p * p
    timestep_embed = 2 * config.frequency_embedding_size * C + 2 * C * C
    linears = 2 * L * (3 * C * C + C * C + config.mlp_weights)
    block = linears + attention(L, L, C)
    final = 2 * L * C * config.out_channels * p * p
    return patch_embed + timestep_embed + config.modulation_flops + config.depth * block + final + config.other_flops


def teacher_forward(config: ModelShape) -> int:
    """One forward of the teacher."""
    return segment_forward(config) + config.context_flops


def baseline_sampling(config: ModelShape, steps: int) -> int:
    """`steps` teacher-sized forwards: plain step distillation (N = 0). What is of a sample alone is counted once."""
    return steps * segment_forward(config) + config.context_flops


def history(config: ModelShape, steps: int, history_layers: int, window: int | None = None, sink: int = 0) -> int:
    """What reading history adds: N * S(S-1)/2 * 4 L^2 C for the block-causal mask (ARD, Sec. 3)."""
    if not 0 <= history_layers <= config.depth:
        raise ValueError(f"flops: history_layers is {history_layers}; expected 0 to depth={config.depth}")
    check_window("flops", window, sink)
    L, C = config.tokens, config.hidden_size
    with_history = attention(steps * L, L, C, window, sink)
    return history_layers * (with_history - attention(steps * L, L, C, window=1))


def student_sampling(
    config: ModelShape, steps: int, history_layers: int, window: int | None = None, sink: int = 0
) -> int:
    """`steps` cached student forwards of L tokens each."""
    return baseline_sampling(config, steps) + history(config, steps, history_layers, window, sink)


def student_forward(
    config: ModelShape, steps: int, history_layers: int, window: int | None = None, sink: int = 0
) -> int:
    """One teacher-forced training forward over all steps * L tokens; the same work as sampling, done at once."""
    return student_sampling(config, steps, history_layers, window, sink)
