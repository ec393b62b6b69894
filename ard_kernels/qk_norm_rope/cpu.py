"""qk_norm_rope on the C++ kernels of csrc/qk_norm_rope: passes pointers and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.common import extension
from ard_kernels.qk_norm_rope.native import parameter, rule_fields, table_fields, view
from ard_kernels.qk_norm_rope.spec import Rule

refuses = extension.refuses_cpu


def forward(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    statistics = extension.pointer(mean), extension.pointer(rstd)
    extension.module.qk_norm_rope_forward(
        rule_fields(x, rule), parameter(weight), parameter(bias), table_fields(cos, sin), view(x), view(y),
        *statistics, torch.get_num_threads(),
    )  # fmt: skip


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    B, T, H, D = x.shape
    sums, width = (dweight is not None) + (dbias is not None), H * D if rule.over_all else D
    floats = extension.module.qk_norm_rope_chunks(B * T) * sums * width
    workspace = x.new_empty(floats, dtype=torch.float32)
    extension.module.qk_norm_rope_backward(
        rule_fields(x, rule), parameter(weight), table_fields(cos, sin), view(grad_y), view(x),
        extension.pointer(mean), extension.pointer(rstd), view(dx), parameter(dweight), parameter(dbias),
        workspace.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
