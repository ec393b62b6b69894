"""The ARD student (arXiv 2504.11295): a teacher's blocks over S segments of one trajectory, attending to its history.

Shape suffixes as in `trunk.py`. Segment 0 holds the noise, segment s the state that step s - 1 has predicted; each has
a time of its own, in its family's units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.families import FAMILIES
from ard.models.layers import Attend
from ard.models.trunk import FinalLayer, Teacher, Trunk
from ard_kernels import HistoryCache, HistoryRouting, block_causal_attention_packed


def final_layer_name(segment: int) -> str:
    """Published name of a segment's final layer: final_layer, final_layer2, final_layer3, ..."""
    return "final_layer" if segment == 0 else f"final_layer{segment + 1}"


@functools.cache
def _class_of(family: str) -> type[ARDStudent]:
    return type("ARDStudent", (ARDStudent, FAMILIES[family].trunk), {"__doc__": ARDStudent.__doc__})


def _blank(family: str) -> ARDStudent:
    """An instance without contents, which `pickle` and `copy` fill."""
    cls = _class_of(family)
    return cls.__new__(cls)


class ARDStudent(Trunk):
    """Few-step student of any family: an instance is of a subclass that joins this one and the family's trunk.

    In blocks 0..history_layers-1 a query of segment s sees the keys of the earlier segments that `window` and `sink`
    allow; in the other blocks only its own segment. window=None is the paper's M4 (block-causal), window=1 M1, window=2
    M2, window=1 with sink=1 M3.
    timesteps: a time for each of the `steps` segments; None spaces them evenly from noise to data, which for DiT is
    the published 999 * (1 - s / S).
    Final layers keep the teacher's sigma channels (they start as copies); the outputs drop them.
    """

    def __new__(cls, config: ModelConfig | None = None, *_: Any, **__: Any) -> ARDStudent:
        if cls is not ARDStudent:  # a copy of an instance comes without its config
            return super().__new__(cls)
        if not isinstance(config, ModelConfig):
            raise TypeError(f"ARDStudent: config is a {type(config).__name__}; expected a family's config")
        return super().__new__(_class_of(config.family))

    def __init__(
        self,
        config: ModelConfig,
        *,
        steps: int = 4,
        history_layers: int = 6,
        window: int | None = None,
        sink: int = 0,
        timesteps: Sequence[float] | None = None,
    ):
        if steps < 1:
            raise ValueError(f"ARDStudent: steps is {steps}; expected at least 1")
        if timesteps is not None and len(timesteps) != steps:
            raise ValueError(f"ARDStudent: timesteps are {list(timesteps)}; expected steps={steps} of them")
        ends = sorted((config.CONVENTION.noise_time, config.CONVENTION.data_time))
        if any(not ends[0] <= time <= ends[1] for time in timesteps or ()):  # NaN is none
            raise ValueError(
                f"ARDStudent: timesteps are {list(timesteps or ())}; expected within [{ends[0]:g}, {ends[1]:g}], the "
                f"times of family={config.family!r}"
            )
        super().__init__(config)
        self.steps = steps
        self.segment_times = None if timesteps is None else tuple(map(float, timesteps))
        self.routing = HistoryRouting(config.depth, history_layers, window=window, sink=sink)
        for segment in range(steps):
            self.add_module(final_layer_name(segment), self.final_layer_class(config))
        self.initialize_weights()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made here and has no name to import: pickled by family. (FSDP makes another class of it.)"""
        family = self.config.family
        if type(self) is not _class_of(family):
            return super().__reduce_ex__(protocol)
        return _blank, (family,), self.__dict__

    @property
    def settings(self) -> dict[str, Any]:
        """What `ARDStudent` was made with, besides its config."""
        routing = {"history_layers": self.routing.history_layers, "window": self.routing.window}
        return {"steps": self.steps, **routing, "sink": self.routing.sink, "timesteps": self.segment_times}

    @classmethod
    def from_teacher(
        cls,
        teacher: Teacher,
        *,
        steps: int = 4,
        history_layers: int = 6,
        window: int | None = None,
        sink: int = 0,
        timesteps: Sequence[float] | None = None,
    ) -> ARDStudent:
        """A student whose every weight is a copy of the teacher's, on its device; so is each final layer."""
        routing: dict[str, Any] = {"history_layers": history_layers, "window": window, "sink": sink}
        with torch.device("meta"):
            student = cls(teacher.config, steps=steps, timesteps=timesteps, **routing)
        state = teacher.state_dict()
        for segment in range(1, steps):
            for name, tensor in teacher.final_layer.state_dict().items():
                state[f"{final_layer_name(segment)}.{name}"] = tensor
        student.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
        return student.train(teacher.training)

    @property
    def final_layers(self) -> list[FinalLayer]:
        """Final layer of each segment."""
        layers = [self.get_submodule(final_layer_name(segment)) for segment in range(self.steps)]
        return cast("list[FinalLayer]", layers)

    def timesteps(self, segments: int, device: torch.device) -> Tensor:
        """Times of the first `segments` segments, (1, segments) float32."""
        if self.segment_times is None:
            return self.config.CONVENTION.even_times(segments, self.steps, device)[None]
        # Filled on the device, one by one: a copy from the host could not be captured in a CUDA graph.
        times = [torch.full((1,), time, dtype=torch.float32, device=device) for time in self.segment_times[:segments]]
        return torch.cat(times)[None]

    def forward(self, states_BSchw: Tensor, *conditions: Tensor) -> Tensor:
        """Teacher-forced training forward: one pass over all T tokens.

        states_BSchw: (B, s, c, h, w), 1 <= s <= steps; [:, 0] is the noise, the others are trajectory states.
        conditions: as the family's config names them, (B, ...) each: labels int64 (B,) for the class-conditional ones.
        Returns predictions of the next states, (B, s, c, h, w).
        """
        self.check_inputs("states", states_BSchw, conditions, ("B", "S"))
        S, L = states_BSchw.shape[1], self.config.tokens
        if not 1 <= S <= self.steps:
            raise ValueError(f"states: got {S} segments; expected 1 to steps={self.steps}")

        def attend(layer: int) -> Attend:
            return partial(block_causal_attention_packed, segment_length=L, **self.routing.mask(layer))

        c_BSC = self.condition(self.timesteps(S, states_BSchw.device), *conditions)
        x_BTC, context = self.embed(states_BSchw), self.context(*conditions)
        tokens_BSLP = self.transform(x_BTC, attend, self.final_layers[:S], c_BSC=c_BSC, context=context)
        return self.unpatchify(tokens_BSLP, self.config.in_channels)

    def new_cache(self, batch: int) -> HistoryCache:
        """An empty cache for `sample` with this batch size, on the weights' device, in the dtype K and V will have."""
        kind = self.weight.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return HistoryCache(
            layers=self.routing.history_layers,
            batch=batch,
            heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            capacity=self.steps * self.config.tokens,
            dtype=torch.get_autocast_dtype(kind) if autocast else self.weight.dtype,
            device=self.weight.device,
        )

    @torch.no_grad()
    def sample(
        self,
        noise_Bchw: Tensor,
        *conditions: Tensor,
        cache: HistoryCache | None = None,
        on_step: Callable[[int, Tensor], Tensor | None] | None = None,
    ) -> Tensor:
        """S cached forwards of L tokens, each reading the previous prediction; equals `forward` on its own predictions.

        noise_Bchw: (B, c, h, w); conditions as in `forward`. Returns all predictions (B, S, c, h, w); the last is the
        image.
        cache: from `new_cache(B)`, to reuse its memory between calls; it is reset here.
        on_step: called with (s, prediction) after each step; what it returns, if not None, takes its place.
        """
        self.check_inputs("noise", noise_Bchw, conditions, ("B",))
        L, final_layers = self.config.tokens, self.final_layers
        if cache is None:
            cache = self.new_cache(noise_Bchw.shape[0])
        cache.reset()

        def attend(layer: int) -> Attend:
            return partial(self.routing.attention_packed, layer, segment_length=L, cache=cache)

        # What depends on times and conditions only is made once and not S times: rows (adaLN weights are a third of
        # DiT), keys and values of text.
        context = self.context(*conditions)
        c_BSC = self.condition(self.timesteps(self.steps, noise_Bchw.device), *conditions)
        shared = self.shared(c_BSC)
        prepared = [block.prepare(shared, context) for block in self.blocks]
        final_rows_BSR = self.final_rows(c_BSC, final_layers)

        state_Bchw, predictions = noise_Bchw, []
        for s in range(self.steps):
            tokens_BSLP = self.transform(
                self.embed(state_Bchw[:, None]),
                attend,
                final_layers[s : s + 1],
                prepared=[(rows_BSR[:, s : s + 1], read) for rows_BSR, read in prepared],
                final_rows_BSR=final_rows_BSR[:, s : s + 1],
            )
            state_Bchw = self.unpatchify(tokens_BSLP, self.config.in_channels)[:, 0]
            replaced = on_step(s, state_Bchw) if on_step else None
            state_Bchw = state_Bchw if replaced is None else replaced
            predictions.append(state_Bchw)
        return torch.stack(predictions, dim=1)
