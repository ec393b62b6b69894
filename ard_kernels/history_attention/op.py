"""`ard::history_attention`: schema (it writes the cache), dispatch, FLOPs. Inference only.

The op reads where the cache stands from its `positions` when it runs, and moves them on: nothing of that is baked into
a compiled graph, so one graph takes every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.spec import check_qkv, check_rows_apart, check_window, empty_output
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.library import define_op
from ard_kernels.history_attention import cpu, cuda, spec, torch_impl
from ard_kernels.history_attention.backend import Append, Kernels
from ard_kernels.history_attention.norm import HeadNorm, check_norm
from ard_kernels.history_attention.splits import workspace_elements

if TYPE_CHECKING:
    from ard_kernels.history_attention import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.history_attention.triton_impl")

OP = "history_attention"

KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl}
# The backends whose attention is PyTorch's, which makes its own output: see block_causal_attention/op.py.
APPENDS: dict[str, Append] = {"cpu": cpu.append, "torch": torch_impl.append}

register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "triton", triton_support.refuses)
register_backend(OP, "cpu", cpu.refuses)
register_backend(OP, "torch", serves_everything)


def norm_fields(norm: HeadNorm | None) -> tuple[str | None, Tensor | None, Tensor | None, float]:
    """`norm` as the op takes it: kind (None: no norm), weight, bias, eps."""
    return (None, None, None, 0.0) if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)


def _norm_of(kind: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> HeadNorm | None:
    return None if kind is None else HeadNorm(kind, weight, bias, eps)


def check_memory(keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor) -> None:
    """ValueError unless these are the tensors of a HistoryCache."""
    spec.check_memory(OP, keys, values, workspace, positions, workspace_elements(keys.shape[-1], keys.device))


def _check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor,
    layer: int, window: int | None, sink: int, scale: float, *norms_and_backend: Any,
) -> None:  # fmt: skip
    *norms, backend = norms_and_backend
    check_qkv(OP, q, k, v, "bhtd", grouped=False)
    check_rows_apart(OP, {"q": q, "k": k, "v": v})
    check_window(OP, window, sink)
    check_memory(keys, values, workspace, positions)
    spec.check_layer(OP, layer, keys.shape[0])
    spec.check_segment(OP, k, keys)
    for name, fields in (("q_norm", norms[:4]), ("k_norm", norms[4:])):
        check_norm(OP, name, _norm_of(*fields), q)
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _history(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor,
    layer: int, window: int | None, sink: int, scale: float, *norms_and_backend: Any,
) -> Tensor:  # fmt: skip
    *norms, backend = norms_and_backend
    spec.refuse_recomputation(OP)
    layers, _, _, capacity, _ = keys.shape
    places = positions.numpy()
    offsets = spec.next_offsets(OP, places, layers, capacity, layer, k.shape[2])
    segment, cache = (q, k, v), (keys[layer], values[layer])
    seen = offsets[-2], *spec.visible_tokens(offsets, window, sink)
    q_norm, k_norm = _norm_of(*norms[:4]), _norm_of(*norms[4:])
    if backend in APPENDS and q.numel():
        out = torch_impl.forward(*segment, *cache, *seen, scale, q_norm, k_norm, APPENDS[backend])
    else:
        out = empty_output(q)
        if q.numel():
            KERNELS[backend].forward(*segment, *cache, out, workspace, *seen, scale, q_norm, k_norm)
    if not keys.is_inference():  # kernels write behind autograd's back: what has saved the keys shall notice
        torch.autograd.graph.increment_version((keys, values))
    spec.advance(places, layers, layer, offsets)
    return out


def _history_fake(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor, layer: int,
    *_: Any,
) -> Tensor:  # fmt: skip
    if type(positions) is torch.Tensor and q.is_meta:  # meta tensors have shapes only; the positions are there
        layers, capacity = keys.shape[0], keys.shape[3]
        offsets = spec.next_offsets(OP, positions.numpy(), layers, capacity, layer, k.shape[2])
        spec.advance(positions.numpy(), layers, layer, offsets)
    return empty_output(q)


def _history_flops(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor,
    layer: int, window: int | None, sink: int, *_: Any,
) -> int:  # fmt: skip
    if type(positions) is not torch.Tensor:
        raise NotImplementedError(f"{OP}: FLOPs depend on the cache's positions; expected no fake tensors in a count")
    B, H, L, D = q.shape
    offsets = spec.offsets_of(positions, keys.shape[0], layer)  # the new segment's, too
    sink_stop, window_start = spec.visible_tokens(offsets, window, sink)
    return 4 * B * H * D * L * (sink_stop + offsets[-1] - window_start)


history_op = define_op(
    "history_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) workspace, "
    "Tensor(d!) positions, int layer, int? window, int sink, float scale, "
    "str? q_norm, Tensor? q_weight, Tensor? q_bias, float q_eps, "
    "str? k_norm, Tensor? k_weight, Tensor? k_bias, float k_eps, str backend) -> Tensor",
    _history,
    _history_fake,
    check=_check,
    flops=_history_flops,
    reads_host=True,
)
