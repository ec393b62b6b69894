"""Attention under any mask against the fp64 reference, under the rule of oracle.py: values, gradients, lse."""

from __future__ import annotations

import torch

from ard_kernels import segment_attention
from ard_kernels.block_causal_attention.reference import segment_attention as reference
from testing import plain
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_all_close, error_norm, rounding_floor

FP32 = torch.float32


MEMORY = ("contiguous", "bthd", "packed", "offset", "misaligned", "expanded batches", "expanded heads")


def leaves(device, dtype, B, H, kv_heads, T, k_tokens, D):
    shapes = (B, H, T, D), *[(B, kv_heads, k_tokens, D)] * 2
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def hold(memory: str, B: int, H: int, T: int, D: int, dtype: torch.dtype, device="cpu"):
    """A (B, H, T, D) view of a leaf, in memory that kernels read where it is."""

    def leaf(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    if memory == "bthd":
        x = leaf(B, T, H, D)
        return x.transpose(1, 2)
    if memory == "packed":
        x = leaf(B, T, 3, H, D)
        return x[:, :, 1].transpose(1, 2)
    if memory == "offset":  # strided in T and D, starting past the storage's beginning
        x = leaf(B, H, 2 * T + 1, D + 8)
        return x[:, :, 1::2, 8:]
    if memory == "misaligned":  # by an element
        x = leaf(B * H * T * D + 1)
        return x[1:].view(B, H, T, D)
    x = leaf(1 if memory == "expanded batches" else B, 1 if memory == "expanded heads" else H, T, D)
    return x.expand(B, H, T, D)


def rounding_of_out(q, k, v, lse, sees, scale) -> float:
    """Norm of what fp32 roundings of the weights, apart from each other, change in out, of few numbers."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    lse = lse.masked_fill(lse.isinf(), 0)[..., None]
    error = torch.finfo(torch.float32).eps * (1 + lse.abs()) * (q @ k.mT * scale - lse).exp().masked_fill(~sees, 0)
    return (error.square() @ v.square()).sum().sqrt().item()


def rounding_of_lse(q, k, lse, sees, scale) -> float:
    """Norm of what fp32 roundings of q k^T, summed in whatever order, and of their softmax may change in lse."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    weights = (q @ k.mT * scale - lse.masked_fill(lse.isinf(), 0)[..., None]).exp().masked_fill(~sees, 0)
    return torch.finfo(torch.float32).eps * abs(scale) * (weights * (q.abs() @ k.abs().mT)).sum(-1).norm().item()


def rounding_of_gradients(q, k, v, out, lse, sees, grad_out, scale):
    """Norms of what fp32 roundings of the scores, their lse, do.v and do.out may change in dq, dk and dv.

    With one key the last two are the same number, and dq and dk nothing but what is left of it; plain PyTorch has 0.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    lse = lse.masked_fill(lse.isinf(), 0)[..., None]
    scores = q @ k.mT * scale
    error = torch.finfo(torch.float32).eps * (1 + scores.abs() + lse.abs()) * (scores - lse).exp().masked_fill(~sees, 0)
    ds = error * (grad_out.abs() @ v.abs().mT + (grad_out * out).abs().sum(-1, keepdim=True)) * abs(scale)
    return (ds @ k.abs()).norm().item(), (ds.mT @ q.abs()).norm().item(), (error.mT @ grad_out.abs()).norm().item()


def check_norms(got, other, exact, factor: float, floor: float, label: str = "") -> None:
    """The rule of oracle.py, and a floor: `other` is one draw of a random variable where numbers are few."""
    allowed = factor * error_norm(other, exact) + rounding_floor(exact.norm().item(), got.dtype) + floor
    error = error_norm(got, exact)
    assert error <= allowed, f"{label}: error {error:.3e} > {allowed:.3e}, with a floor of {floor:.3e}"


def check(
    backend, device, mask, q_lengths, k_lengths, B=1, kv_heads=1, share=1, D=16, dtype=FP32, drawn=False,
    memory=("contiguous",) * 3, scale=None,
):  # fmt: skip
    """Values and gradients, with a gradient of lse, under the 1.5x / 2x rule; exact zeros of what sees nothing.

    drawn: they may also err by `rounding_of_out`, `rounding_of_lse` and `rounding_of_gradients`, since there may be a
    single query, and it may see a single key. memory: of q, k, v.
    """
    shapes = (B, kv_heads * share, sum(q_lengths), D), *[(B, kv_heads, sum(k_lengths), D)] * 2
    q, k, v = (hold(kind, *shape, dtype, device) for kind, shape in zip(memory, shapes, strict=True))
    how = {"segment_length": q_lengths, "key_segment_length": k_lengths, "scale": scale, "backend": backend}
    sees, number = mask.dense(q_lengths, k_lengths, device), D**-0.5 if scale is None else scale
    results = [segment_attention(q, k, v, mask, return_lse=True, **how)]
    results += [plain.segment_attention(q, k, v, sees, scale), reference(q, k, v, sees, scale)]
    (out, lse), (plain_out, _), (expected, expected_lse) = results
    wide = [x.detach().double() for x in (q, k, v, expected, expected_lse)]
    floor = rounding_of_out(*wide[:3], wide[4], sees, number) if drawn else 0
    check_norms(out, plain_out, expected, FORWARD_FACTOR, floor, "out")
    blind = ~sees.any(-1)
    assert (lse[..., blind] == float("-inf")).all() and not out[:, :, blind].any()
    if backend == "cpu":
        fp32_lse = plain.segment_attention(*(x.detach().float() for x in (q, k, v)), sees, scale)[1]
        floor = rounding_of_lse(*wide[:2], wide[4], sees, number) if drawn else 0
        check_norms(*(x.detach()[..., ~blind] for x in (lse, fp32_lse, expected_lse)), FORWARD_FACTOR, floor)
    else:  # PyTorch's kernel of 16-bit numbers has an exp of 20 bits
        tolerance = {"rtol": 1e-5, "atol": 2e-2 if dtype != FP32 else 1e-4}
        torch.testing.assert_close(lse[..., ~blind], expected_lse[..., ~blind].float(), **tolerance)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grad_lse[..., blind] = float("nan")  # what merging makes of it must not matter
    grads = []
    for each_out, each_lse in results:
        lse_share = torch.where(blind, 0, grad_lse).to(each_lse.dtype)
        if each_out is out:
            lse_share = grad_lse
        else:
            each_lse = each_lse.masked_fill(blind, 0)
        outputs, cotangents = (each_out, each_lse), (grad_out.to(each_out.dtype), lse_share)
        grads.append(torch.autograd.grad(outputs, (q, k, v), cotangents))  # of the views: no sums of autograd's
    ours, plains, exact = grads[0], grads[1], [g.double() for g in grads[2]]
    if drawn:
        floors = rounding_of_gradients(*wide, sees, grad_out.double(), number)
        for *tensors, floor in zip(ours, plains, exact, floors, strict=True):
            check_norms(*tensors, BACKWARD_FACTOR, floor)
    else:
        assert_all_close(ours, plains, exact, factor=BACKWARD_FACTOR, label="grad")
    assert not grads[0][0][:, :, blind].any()
    for grad in grads[0][1:]:
        assert not grad[:, :, ~sees.any(0)].any()
