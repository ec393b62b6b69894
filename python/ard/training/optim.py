"""AdamW, its state as named tensors, and the gradient norm; for plain and for sharded parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ard.training.distributed import assign, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Named parameters that require a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters."""
    parameters = trainable(model).values()
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """State of an optimizer from `adamw`: "exp_avg.<name>" and "exp_avg_sq.<name>", sharded as the parameter is, and
    "step.<name>". Before the first update there is none.
    """
    return {
        f"{key}.{name}": value
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; ``tensors`` are whole and the same on all ranks.

    Raises ValueError on other names.
    """
    expected = {f"{key}.{name}" for name in trainable(model) for key in (*_MOMENTS, "step")}
    if tensors and tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise ValueError(f"load_optimizer: {len(odd)} names differ from the model's, first {odd[0]!r}")
    if not tensors:
        return
    for name, parameter in trainable(model).items():
        state = {"step": tensors[f"step.{name}"].to(parameter.device)}
        for key in _MOMENTS:
            state[key] = torch.zeros_like(parameter)
            assign(state[key], tensors[f"{key}.{name}"])
        optimizer.state[parameter] = state


def clip_gradients(optimizer: torch.optim.AdamW, limit: float) -> float:
    """Scales the gradients to a 2-norm of at most ``limit`` over all parameters; returns the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(whole(nn.utils.clip_grad_norm_(parameters, limit)))
