"""Errors of every op against its fp64 reference, beside those of plain PyTorch in the same dtype, at model sizes.

The tests demand err(ours) <= 1.5 x err(plain) forward and 2 x backward; this publishes the ratios.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ard_kernels import adaln_modulate, block_causal_attention, gate_residual_adaln
from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.segment_adaln import reference as adaln_reference
from benchmarks.rows import best_device

B, H, S, L, D = 1, 4, 4, 128, 72
T, C = S * L, 1152


def plain_attention(q, k, v):
    mask = dense_mask([L], T, None, 0, q.device)
    return (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def plain_modulate(x, shift, scale):
    shift, scale = (row.repeat_interleave(L, 1) for row in (shift, scale))
    return F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift


def plain_gated(x, branch, gate, shift, scale):
    h = x + gate.repeat_interleave(L, 1) * branch
    return h, plain_modulate(h, shift, scale)


def errors(op: str, dtype: torch.dtype) -> list[dict]:
    ours, plain, reference, shapes = OPS[op]
    device = best_device()
    values = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    outputs, grads = [], []
    for function in (ours, plain, reference):
        # The reference's inputs are fp64, or autograd would round its gradients.
        inputs = [(x.double() if function is reference else x.clone()).requires_grad_() for x in values]
        ys = function(*inputs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        torch.manual_seed(1)
        weights = [torch.randn(y.shape, device=device).to(dtype) for y in ys]
        outputs.append(ys)
        grads.append(torch.autograd.grad(ys, inputs, [w.to(y.dtype) for w, y in zip(weights, ys, strict=True)]))
    rows = []
    for direction, (got, other, exact) in (("forward", outputs), ("backward", grads)):
        for index in range(len(exact)):
            norms = [(tensors[index].double() - exact[index].double()).norm().item() for tensors in (got, other)]
            rows.append(
                {
                    "op": op,
                    "dtype": str(dtype).removeprefix("torch."),
                    "direction": direction,
                    "tensor": index,
                    "relative_error": norms[0] / exact[index].double().norm().item(),
                    "ratio_to_plain": norms[0] / norms[1] if norms[1] else float(norms[0] > 0),
                }
            )
    return rows


OPS = {
    "block_causal_attention": (
        lambda *qkv: block_causal_attention(*qkv, segment_length=L),
        plain_attention,
        lambda *qkv: attention_reference(*qkv, [L])[0],
        [(B, H, T, D)] * 3,
    ),
    "adaln_modulate": (
        lambda *tensors: adaln_modulate(*tensors, segment_length=L),
        plain_modulate,
        lambda *tensors: adaln_reference.adaln_modulate(*tensors, [L]),
        [(B, T, C), (B, S, C), (B, S, C)],
    ),
    "gate_residual_adaln": (
        lambda *tensors: gate_residual_adaln(*tensors, segment_length=L),
        plain_gated,
        lambda *tensors: adaln_reference.gate_residual_adaln(*tensors, [L]),
        [(B, T, C)] * 2 + [(B, S, C)] * 3,
    ),
}
