"""`ard::history_attention`: schema (it writes the cache), dispatch, FLOPs. Inference only."""

from __future__ import annotations

from ard_kernels import triton_support
from ard_kernels.backends import register_backend
from ard_kernels.block_causal_attention.torch_impl import as_output, out_like
from ard_kernels.history import cpu, torch_impl
from ard_kernels.library import define_op

IMPLEMENTATIONS = {
    "triton": triton_support.LazyModule("ard_kernels.history.triton_impl"),
    "cpu": cpu,
    "torch": torch_impl,
}

register_backend("history_attention", "triton", triton_support.refuses)
register_backend("history_attention", "cpu", cpu.refuses)
register_backend("history_attention", "torch", torch_impl.refuses)


def _history(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale, backend):
    if q.numel() == 0:
        return out_like(q)
    run = IMPLEMENTATIONS[backend].forward
    return as_output(run(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale))


def _history_fake(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale, backend):
    return out_like(q)


def _history_flops(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, *args, **kwargs) -> int:
    B, H, L, D = q
    return 4 * B * H * D * L * (sink_stop + start + L - window_start)


history_op = define_op(
    "history_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor(c!) workspace, SymInt start, SymInt sink_stop, SymInt window_start, float scale, str backend) -> Tensor",
    _history,
    _history_fake,
    flops=_history_flops,
)
