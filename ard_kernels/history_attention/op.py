"""`ard::history_attention`: schema (it writes the cache), dispatch, FLOPs. Inference only.

The op reads where the cache stands from its `positions` when it runs, and moves them on: nothing of that is baked into
a compiled graph, so one graph takes every step.
"""

from __future__ import annotations

import torch

from ard_kernels.block_causal_attention.spec import check_qkv, check_rows_apart, check_window
from ard_kernels.block_causal_attention.torch_impl import out_like
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend
from ard_kernels.common.library import define_op
from ard_kernels.history_attention import cpu, cuda, spec, torch_impl
from ard_kernels.history_attention.norm import HeadNorm, check_norm, normalise
from ard_kernels.history_attention.splits import workspace_elements

OP = "history_attention"

IMPLEMENTATIONS = {
    "cuda": cuda,
    "triton": triton_support.LazyModule("ard_kernels.history_attention.triton_impl"),
    "cpu": cpu,
    "torch": torch_impl,
}

register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "triton", triton_support.refuses)
register_backend(OP, "cpu", cpu.refuses)
register_backend(OP, "torch", torch_impl.refuses)


def norm_fields(norm: HeadNorm | None) -> tuple:
    """`norm` as the op takes it: kind (None: no norm), weight, bias, eps."""
    return (None, None, None, 0.0) if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)


def _norm_of(kind, weight, bias, eps) -> HeadNorm | None:
    return None if kind is None else HeadNorm(kind, weight, bias, eps)


def check_memory(keys, values, workspace, positions) -> None:
    """ValueError unless these are the tensors of a HistoryCache."""
    spec.check_memory(OP, keys, values, workspace, positions, workspace_elements(keys.shape[-1], keys.device))


def _check(q, k, v, keys, values, workspace, positions, layer, window, sink, scale, *norms_and_backend):
    *norms, backend = norms_and_backend
    check_qkv(OP, q, k, v, "bhtd")
    check_rows_apart(OP, {"q": q, "k": k, "v": v})
    check_window(OP, window, sink)
    check_memory(keys, values, workspace, positions)
    spec.check_layer(OP, layer, keys.shape[0])
    spec.check_segment(OP, k, keys)
    for name, fields in (("q_norm", norms[:4]), ("k_norm", norms[4:])):
        check_norm(OP, name, _norm_of(*fields), q)
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _history(q, k, v, keys, values, workspace, positions, layer, window, sink, scale, *norms_and_backend):
    *norms, backend = norms_and_backend
    layers, _, _, capacity, _ = keys.shape
    places = positions.numpy()
    offsets = spec.next_offsets(OP, places, layers, capacity, layer, k.shape[2])
    if q.numel() == 0:
        out = out_like(q)
    else:
        q_norm, k_norm = _norm_of(*norms[:4]), _norm_of(*norms[4:])
        run = IMPLEMENTATIONS[backend].forward
        where = (keys[layer], values[layer], workspace, offsets[-2], *spec.visible_tokens(offsets, window, sink), scale)
        if backend == "cuda":  # its append normalises
            out = run(q, k, v, *where, q_norm, k_norm)
        else:
            out = run(normalise(q, q_norm), normalise(k, k_norm), v, *where)
    if not keys.is_inference():  # kernels write behind autograd's back: what has saved the keys shall notice
        torch.autograd.graph.increment_version((keys, values))
    spec.advance(places, layers, layer, offsets)
    return out


def _history_fake(q, k, v, keys, values, workspace, positions, layer, *_):
    if type(positions) is torch.Tensor and q.is_meta:  # meta tensors have shapes only; the positions are there
        layers, capacity = keys.shape[0], keys.shape[3]
        offsets = spec.next_offsets(OP, positions.numpy(), layers, capacity, layer, k.shape[2])
        spec.advance(positions.numpy(), layers, layer, offsets)
    return out_like(q)


def _history_flops(q, k, v, keys, values, workspace, positions, layer, window, sink, *args) -> int:
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
