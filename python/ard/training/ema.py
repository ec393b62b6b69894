"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ard.training.distributed import assign, local
from ard_kernels.common.library import private

_lerp_all = private("_foreach_lerp_")

Model = TypeVar("Model", bound=nn.Module)


class Ema:
    """``average <- d * average + (1 - d) * value`` with ``d = min(decay, (1 + step) / (10 + step))``.

    The warm-up keeps the first averages close to the weights, which matters when a run is shorter than 1 / (1 - decay).
    Buffers are copied, not averaged. Averages of sharded parameters are sharded alike.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Ema: decay={decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._parameters = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(self.state[name]) for name in self._parameters]
        values = [local(value) for value in model.parameters()]
        if _lerp_all:  # in one kernel
            _lerp_all(averages, values, 1.0 - decay)
        else:
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, 1.0 - decay)
        for name, value in model.named_buffers():
            if name in self.state:
                self.state[name].copy_(value)

    def copy_to(self, model: Model) -> Model:
        """Loads the average into ``model`` and returns it."""
        model.load_state_dict(self.state)
        return model

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over whole tensors of all names, the same on all ranks."""
        for name, value in self.state.items():
            assign(value, state[name])
