"""What every family's teacher and student share, and what a family gives: the protocol of docs/add_a_model.md.

Shape suffixes used in this room:

    B batch   S segments   L tokens of one segment   T = S*L tokens   H heads   D head width   C = H*D model width
    R width of a modulation row (6C in a block, 2C in a final layer)   P = patch*patch*out_channels   chw latent

A trunk is embedders and blocks; a teacher adds one final layer, a student one for each segment. The teacher is the case
S = 1 of the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ard.models.config import ModelConfig
from ard.models.layers import Attend, Context, Pending, Prepared, linear
from ard_kernels import block_causal_attention_packed, gate_residual


class Block(nn.Module):
    """A transformer block that leaves its last residual pending, so that the next op adds it and normalizes at once.

    A family's block gives `residuals`, and has `adaLN_modulation`, from conditioning (B, S, C) to its rows (B, S, R),
    or another `rows`.
    """

    adaLN_modulation: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False  # keep the inputs only, and run again in backward (activation checkpointing)

    def rows(self, c: Tensor) -> Tensor:
        """Modulation rows (B, S, R) of what `Trunk.shared` gives."""
        return self.adaLN_modulation(c)

    def read_context(self, context: Context) -> Context:
        """The form in which this block reads the context: keys and values of text."""
        return context

    def prepare(self, c: Tensor, context: Context) -> Prepared:
        """What depends on times and conditions only, so that a sampler computes it once for all steps."""
        return self.rows(c), self.read_context(context)

    def residuals(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        segment_length: int,
        rows_BSR: Tensor,
        context: Context,
    ) -> tuple[Tensor, Pending]:
        """x plus the pending residual plus this block's first; and this block's last, pending."""
        raise NotImplementedError

    def forward(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        *,
        segment_length: int,
        c: Tensor | None = None,
        context: Context = (),
        prepared: Prepared | None = None,
    ) -> tuple[Tensor, Pending]:
        """Give either `c`, of `Trunk.shared`, and the context, or `prepared = prepare(c, context)`."""
        inputs = (x_BTC, pending, attend, segment_length, c, context, prepared)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._modulated, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._modulated(*inputs)

    def _modulated(
        self,
        x_BTC: Tensor,
        pending: Pending | None,
        attend: Attend,
        segment_length: int,
        c: Tensor | None,
        context: Context,
        prepared: Prepared | None,
    ) -> tuple[Tensor, Pending]:
        if prepared is None:
            assert c is not None
            prepared = self.prepare(c, context)
        return self.residuals(x_BTC, pending, attend, segment_length, *prepared)


class FinalLayer(nn.Module):
    """linear(norm(x) * (1 + scale) + shift): its parts, which `Trunk.finish` calls; a family may add a weight."""

    adaLN_modulation: nn.Module

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.add_modulation(config)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def add_modulation(self, config: ModelConfig) -> None:
        """The weights of `rows`."""
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def rows(self, c_BC: Tensor) -> Tensor:
        """(shift, scale) of a segment, (B, 2C), of its conditioning."""
        return self.adaLN_modulation(c_BC)


class Trunk(nn.Module):
    """Embedders and blocks of one family.

    A family's trunk makes its embedders in `__init__` and sets `blocks`, gives `embed`, `condition`, `null_conditions`,
    `finish` and `initialize_weights`, and may replace `final_layer_class` and `attend_as`.
    """

    final_layer_class: type[FinalLayer] = FinalLayer
    fixed: tuple[str, ...] = ()  # parameters that are never trained
    blocks: Sequence[Block]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def embed(self, states_BSchw: Tensor) -> Tensor:
        """States (B, S, c, h, w) -> tokens (B, T, C) with positions, the same in every segment."""
        raise NotImplementedError

    def condition(self, t_BS: Tensor, *conditions: Tensor) -> Tensor:
        """Conditioning (B, S, C) of times (B, S), or (1, S) when samples share them, and the family's conditions.

        (1, S, C), where samples share the times and no condition enters here.
        """
        raise NotImplementedError

    def shared(self, c_BSC: Tensor) -> Tensor:
        """What the blocks' `rows` read: the conditioning itself, or a projection of it that all blocks share."""
        return c_BSC

    def context(self, *conditions: Tensor) -> Context:
        """What blocks read besides the conditioning, (B, ...) each, the same in every segment: text and its mask."""
        return ()

    def summary(self, c_BC: Tensor, context: Context) -> Tensor:
        """All that steers a sample as one vector (B, C), which a discriminator projects on."""
        return c_BC

    def null_conditions(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """What these conditions are replaced by in the unconditional branch of guidance."""
        raise NotImplementedError

    def finish(self, x_BTC: Tensor, pending: Pending, rows_BSR: Tensor, final_layers: Sequence[FinalLayer]) -> Tensor:
        """The pending residual, then final layer s on segment s: (B, T, C) -> (B, S, L, P)."""
        raise NotImplementedError

    def initialize_weights(self) -> None:
        """Random weights, as training from scratch starts."""
        raise NotImplementedError

    def attend_as(self, attend: Attend) -> Attend:
        """How tokens are mixed, given how q, k, v are: a family may rotate q and k first."""
        return attend

    def check_buffers(self) -> None:
        """Raises ValueError where tensors that a formula gives are others, in weights that have been loaded."""

    def unfreeze(self) -> None:
        """Every parameter is trained, but for the fixed ones."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.fixed)

    @property
    def weight(self) -> Tensor:
        """Whose dtype and device are the model's."""
        return next(self.parameters())

    def transform(
        self,
        x_BTC: Tensor,
        attend: Callable[[int], Attend],
        final_layers: Sequence[FinalLayer],
        *,
        c_BSC: Tensor | None = None,
        context: Context = (),
        prepared: Sequence[Prepared] | None = None,
        final_rows_BSR: Tensor | None = None,
    ) -> Tensor:
        """All blocks, then final layer s on segment s: (B, T, C) -> (B, S, L, P).

        `attend(layer)` is how that layer mixes tokens. In training it holds the mask and not the layer's number: equal
        values share one compiled graph. Modulation comes from `c_BSC`, or from what each block's `prepare` and
        `final_rows` have computed beforehand.
        """
        L = self.config.tokens
        pending: Pending | None = None
        shared = None if c_BSC is None else self.shared(c_BSC)
        for layer, block in enumerate(self.blocks):
            how = {"c": shared, "context": context} if prepared is None else {"prepared": prepared[layer]}
            x_BTC, pending = block(x_BTC, pending, self.attend_as(attend(layer)), segment_length=L, **how)
        assert pending is not None  # depth >= 1
        if final_rows_BSR is None:
            assert c_BSC is not None
            final_rows_BSR = self.final_rows(c_BSC, final_layers)
        return self.finish(x_BTC, pending, final_rows_BSR, final_layers)

    @staticmethod
    def final_rows(c_BSC: Tensor, final_layers: Sequence[FinalLayer]) -> Tensor:
        """Modulation rows (B, S, 2C); row s is computed by final layer s."""
        rows_BR = [f.rows(c_BC) for f, c_BC in zip(final_layers, c_BSC.unbind(1), strict=True)]
        return torch.stack(rows_BR, dim=1)

    def unpatchify(self, tokens_BSLP: Tensor, channels: int) -> Tensor:
        """(B, S, L, P), P ordered (row in patch, column in patch, channel) -> the first `channels`, (B, S, c, h, w)."""
        B, S = tokens_BSLP.shape[:2]
        (rows, columns), p = self.config.grid_hw, self.config.patch_size
        x = tokens_BSLP.view(B, S, rows, columns, p, p, self.config.out_channels)[..., :channels]
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, S, channels, rows * p, columns * p)

    def check_inputs(self, name: str, images: Tensor, conditions: Sequence[Tensor], leading: tuple[str, ...]) -> None:
        """Raise unless `images` is (*leading, c, h, w) of the configured sizes and the conditions are the family's."""
        chw = self.config.image_shape
        if images.ndim != len(leading) + 3 or tuple(images.shape[-3:]) != chw:
            expected = ", ".join((*leading, *map(str, chw)))
            raise ValueError(f"{name}: got {tuple(images.shape)}; expected ({expected})")
        known = self.config.conditions
        if len(conditions) != len(known):
            names = ", ".join(condition.name for condition in known)
            raise ValueError(f"conditions: got {len(conditions)}; expected {len(known)}: {names}")
        for condition, tensor in zip(known, conditions, strict=True):
            condition.check(tensor, images.shape[0])

    @torch.no_grad()
    def initialize_linears(self) -> None:
        """As the DiT reference: Xavier linears; zero adaLN and final linears, with which a model starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def zero_outputs(self) -> None:
        """Modulation and final linears at zero."""
        for module in self.modules():
            if isinstance(module, (Block, FinalLayer)):
                nn.init.zeros_(linear(cast("nn.Sequential", module.adaLN_modulation), 1).weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)


class Teacher(Trunk):
    """x (B, c, h, w), times (B,), conditions -> the family's raw output (B, `predicted_channels`, h, w)."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.final_layer = self.final_layer_class(config)
        self.initialize_weights()

    @property
    def predicted_channels(self) -> int:
        """Channels that the output keeps."""
        return self.config.in_channels

    def forward(self, x_Bchw: Tensor, t_B: Tensor, *conditions: Tensor) -> Tensor:
        """Predict at the family's own times `t_B` (B,), integers or floating point; conditions as `config` names them.

        What the output is, `config.CONVENTION` says. Raises ValueError for other shapes.
        """
        self.check_inputs("x", x_Bchw, conditions, ("B",))
        if t_B.shape != x_Bchw.shape[:1]:
            raise ValueError(f"t: got {tuple(t_B.shape)}; expected ({x_Bchw.shape[0]},)")

        def attend(layer: int) -> Attend:
            return partial(block_causal_attention_packed, segment_length=self.config.tokens)

        c_BSC = self.condition(t_B[:, None], *conditions)
        x_BTC, context = self.embed(x_Bchw[:, None]), self.context(*conditions)
        tokens_BSLP = self.transform(x_BTC, attend, [self.final_layer], c_BSC=c_BSC, context=context)
        return self.unpatchify(tokens_BSLP, self.predicted_channels)[:, 0]

    def block_outputs(self, x_Bchw: Tensor, c_BSC: Tensor, context: Context = ()) -> list[Tensor]:
        """Tokens (B, L, C) after every block; c_BSC from `condition`, S = 1."""
        L, x_BTC, outputs = self.config.tokens, self.embed(x_Bchw[:, None]), []
        attend, shared = self.attend_as(partial(block_causal_attention_packed, segment_length=L)), self.shared(c_BSC)
        for block in self.blocks:
            x_BTC, (branch_BTC, gate_BSC) = block(x_BTC, None, attend, segment_length=L, c=shared, context=context)
            x_BTC = gate_residual(x_BTC, branch_BTC, gate_BSC, segment_length=L)
            outputs.append(x_BTC)
        return outputs
