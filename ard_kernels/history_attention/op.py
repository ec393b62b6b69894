"""`ard::history_attention`: schema (it writes the cache), dispatch, FLOPs. Inference only.

The op reads where the cache stands from its `positions` when it runs, and moves them on: nothing of that is baked into
a compiled graph, so one graph takes every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention import SegmentMask, merge_attention, segment_attention
from ard_kernels.block_causal_attention.spec import check_qkv, check_rows_apart, check_window, empty_output
from ard_kernels.block_causal_attention.torch_impl import as_output
from ard_kernels.common import triton_support
from ard_kernels.common.backends import check_backend, register_backend, serves_everything
from ard_kernels.common.library import define_op
from ard_kernels.history_attention import cpu, cuda, places, spec, torch_impl
from ard_kernels.history_attention.backend import Kernels
from ard_kernels.history_attention.places import Place, Stand
from ard_kernels.history_attention.splits import workspace_elements

if TYPE_CHECKING:
    from ard_kernels.history_attention import triton_impl
else:
    triton_impl = triton_support.LazyModule("ard_kernels.history_attention.triton_impl")

OP = "history_attention"
WHOLE = SegmentMask([[True]])

KERNELS: dict[str, Kernels] = {"cuda": cuda, "triton": triton_impl, "cpu": cpu}
register_backend(OP, "cuda", cuda.refuses)
register_backend(OP, "triton", triton_support.refuses)
register_backend(OP, "cpu", cpu.refuses)
register_backend(OP, "torch", serves_everything)


def check_memory(keys: Tensor, values: Tensor, workspace: Tensor, positions: Tensor) -> None:
    """ValueError unless these are the tensors of a HistoryCache."""
    spec.check_memory(OP, keys, values, workspace, positions, workspace_elements(keys.shape[-1], keys.device))


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, keys: Tensor, values: Tensor, workspace: Tensor,
    positions: Tensor, layer: int, window: int | None, sink: int, scale: float, commit: bool, backend: str,
) -> None:  # fmt: skip
    check_qkv(OP, q, k, v, "bhtd")
    spec.check_sink_query(OP, q_sink, q, sink)
    check_rows_apart(OP, {"q": q, "k": k, "v": v} | ({} if q_sink is None else {"q_sink": q_sink}))
    check_window(OP, window, sink)
    check_memory(keys, values, workspace, positions)
    spec.check_layer(OP, layer, keys.shape[0])
    spec.check_segment(OP, k, keys)
    spec.check_dtype(OP, k.dtype, keys)
    check_backend(OP, backend, q.device, q.dtype, q.shape[-1])


def _history(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, keys: Tensor, values: Tensor, workspace: Tensor,
    positions: Tensor, layer: int, window: int | None, sink: int, scale: float, commit: bool, backend: str,
) -> Tensor:  # fmt: skip
    spec.refuse_recomputation(OP)
    layers, _, _, capacity, _ = keys.shape
    counts = positions.numpy()
    at = places.stand(OP, counts, layers, capacity, layer, [k.shape[2]], window, sink)
    place = at.place(at.taken, window, sink)
    inputs = q, k, v, keys[layer], values[layer]
    spec.check_apart(OP, inputs[:3] if q_sink is None else (*inputs[:3], q_sink), keys, values)
    places.overwrite(counts, at, 1)
    if not q.numel():
        out = empty_output(q)
    elif q_sink is not None and place.sink[0] < place.sink[1]:
        out = _with_sink_query(*inputs, q_sink, place, scale, backend)
    elif backend in KERNELS:
        out = empty_output(q)
        KERNELS[backend].forward(*inputs, out, workspace, place, scale)
    else:  # PyTorch's attention makes its own output: see block_causal_attention/op.py
        out = torch_impl.forward(*inputs, place, scale)
    if not keys.is_inference():  # kernels write behind autograd's back: what has saved the keys shall notice
        torch.autograd.graph.increment_version((keys, values))
    if commit:
        places.advance(counts, layers, layer, at, 1)
    return out


def _with_sink_query(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, q_sink: Tensor, place: Place, scale: float,
    backend: str,
) -> Tensor:  # fmt: skip
    """Two attentions, of q_sink over the sink and of q over the rest, merged by their log-sum-exps."""
    torch_impl.append(k, v, cache_k, cache_v, place.start)

    def attend(query: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        shared: dict[str, Any] = {"scale": scale, "return_lse": True, "backend": backend}
        shared |= {"segment_length": query.shape[2], "key_segment_length": stop - start}
        return segment_attention(query, cache_k[:, :, start:stop], cache_v[:, :, start:stop], WHOLE, **shared)

    outs, lses = zip(attend(q_sink, *place.sink), attend(q, *place.rest), strict=True)
    return as_output(merge_attention(outs, lses)[0])


def _history_fake(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, keys: Tensor, values: Tensor, workspace: Tensor,
    positions: Tensor, layer: int, window: int | None, sink: int, scale: float, commit: bool, *_: Any,
) -> Tensor:  # fmt: skip
    if type(positions) is torch.Tensor and q.is_meta:  # meta tensors have shapes only; the positions are there
        layers, capacity = keys.shape[0], keys.shape[3]
        at = places.stand(OP, positions.numpy(), layers, capacity, layer, [k.shape[2]], window, sink)
        places.overwrite(positions.numpy(), at, 1)
        if commit:
            places.advance(positions.numpy(), layers, layer, at, 1)
    return empty_output(q)


def _history_flops(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, keys: Tensor, values: Tensor, workspace: Tensor,
    positions: Tensor, layer: int, window: int | None, sink: int, scale: float, commit: bool, *_: Any,
) -> int:  # fmt: skip
    if type(positions) is not torch.Tensor:
        raise NotImplementedError(f"{OP}: FLOPs depend on the cache's positions; expected no fake tensors in a count")
    B, H, L, D = q.shape
    layers, counts = keys.shape[0], positions.numpy()
    segment = int(counts[places.HEADER + layer]) - commit  # the positions are those after the call
    at = Stand(places.read(counts, layers), layers, segment)
    at.add([L])
    return 4 * B * H * D * L * sum(stop - start for start, stop in at.place(segment, window, sink).runs)


def _of_one_layer(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, keys: Tensor, values: Tensor, workspace: Tensor,
    positions: Tensor, layer: int, *settings: Any,
) -> tuple:  # fmt: skip
    """Inputs of the same call on a cache of this layer alone: a stream without end makes a few kinds of them."""
    own = places.of_one_layer(OP, positions, keys.shape[0], keys.shape[3], layer)
    return q, k, v, q_sink, keys[layer : layer + 1], values[layer : layer + 1], workspace, own, 0, *settings


history_op = define_op(
    "history_attention(Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) workspace, Tensor(d!) positions, int layer, int? window, int sink, float scale, bool commit, "
    "str backend) -> Tensor",
    _history,
    _history_fake,
    check=_check,
    flops=_history_flops,
    reads_host=True,
    normal=_of_one_layer,
)
