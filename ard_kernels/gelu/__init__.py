"""GELU in its tanh form, the activation of a DiT's MLP."""

from __future__ import annotations

import torch

from ard_kernels.common.backends import resolve
from ard_kernels.common.self_check import register_trials
from ard_kernels.gelu.op import OP, check_input, composite, gelu_op
from ard_kernels.gelu.trials import UNIT

register_trials(UNIT, UNIT.op)

__all__ = ["gelu"]


def gelu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), elementwise: `F.gelu(x, approximate="tanh")`.

    Args:
        x: any shape; fp32, bf16 or fp16 (fp64 on the torch backend). Computed in fp32.
        backend: None chooses: C++ on the CPU, where PyTorch's takes 3 times as long; elsewhere PyTorch's own.

    Returns:
        y, like x in shape, dtype and memory format. Differentiable (on backend cpu once).

    Raises:
        ValueError: no dense tensor of such a dtype; a backend that cannot serve.

    Source: Gaussian error linear units, arXiv 1606.08415, section 2.
    """
    check_input(x)
    chosen = resolve(OP, backend, x.device, x.dtype, None)
    if chosen == "torch":  # as it is, so that a compiler fuses it into what is beside it
        return composite(x)
    return gelu_op(x, chosen)
