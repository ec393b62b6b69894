"""qk_norm_rope in CUDA C++ (csrc/qk_norm_rope/*.cu): passes pointers, chooses the number of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.cuda import aligned
from ard_kernels.common import extension
from ard_kernels.common.gpu_support import multiprocessors, on_device
from ard_kernels.qk_norm_rope.native import parameter, rule_fields, table_fields, view
from ard_kernels.qk_norm_rope.spec import Rule

# Of a multiprocessor. Forward some waves of blocks, so that the last one costs little; backward what its registers
# hold, as each block writes a row of sums.
THREADS = {"forward": 4096, "backward": 512}


def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why these kernels cannot serve this device and dtype; None when they can."""
    return extension.refuses_cuda(device, dtype)


def _blocks(kernel: str, x_BTHD: Tensor) -> int:
    B, T, H, D = x_BTHD.shape
    warps = extension.gpu(x_BTHD.device).qk_norm_rope_geometry(H, D)[3]
    return min(B * T, multiprocessors(x_BTHD.device) * max(1, THREADS[kernel] // (32 * warps)))


def _aligned_parameter(value: Tensor | None) -> Tensor | None:
    """On 16 bytes, as it is read."""
    return value if value is None or value.data_ptr() % 16 == 0 else value.clone()


@on_device
def forward(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    x, weight, bias = aligned(x), _aligned_parameter(weight), _aligned_parameter(bias)
    extension.gpu(x.device).qk_norm_rope_forward(
        rule_fields(x, rule), parameter(weight), parameter(bias), table_fields(cos, sin), view(x), view(y),
        extension.pointer(mean), extension.pointer(rstd), _blocks("forward", x), extension.stream(x.device),
    )  # fmt: skip


@on_device
def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, rule: Rule,
) -> None:  # fmt: skip
    """See backend.py."""
    grad_y, x, weight = aligned(grad_y), aligned(x), _aligned_parameter(weight)
    blocks = _blocks("backward", x)
    width = sum(grad.numel() for grad in (dweight, dbias) if grad is not None)
    workspace = x.new_empty(blocks * width, dtype=torch.float32)
    extension.gpu(x.device).qk_norm_rope_backward(
        rule_fields(x, rule), parameter(weight), table_fields(cos, sin), view(grad_y), view(x),
        extension.pointer(mean), extension.pointer(rstd), view(dx), parameter(dweight), parameter(dbias),
        workspace.data_ptr(), blocks, extension.stream(x.device),
    )  # fmt: skip
