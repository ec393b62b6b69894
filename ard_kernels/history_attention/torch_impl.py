"""Append a segment to the cache and attend to what it may see, as a composition of PyTorch ops."""

from __future__ import annotations

from torch import Tensor

from ard_kernels.block_causal_attention import dense
from ard_kernels.block_causal_attention.torch_impl import as_output, gather
from ard_kernels.history_attention.places import Place


def append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, start: int) -> None:
    """cache[:, :, start : start + L] = (k, v)."""
    cache_k[:, :, start : start + k.shape[2]] = k
    cache_v[:, :, start : start + v.shape[2]] = v


def forward(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, place: Place, scale: float) -> Tensor:
    """`Kernels.forward` of backend.py, but out (B, H, L, D) with (B, L, H, D) memory is made here, and returned."""
    append(k, v, cache_k, cache_v, place.start)
    runs = place.runs  # one: a view of the cache, two: a copy of what is seen
    calls = dense.of_pytorch(q.device, q.shape[-1])
    out, _lse = calls.attend(q, gather(cache_k, runs), gather(cache_v, runs), scale)
    return as_output(out)
