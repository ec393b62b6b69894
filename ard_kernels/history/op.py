"""`ard::history_attention`: schema (it writes the cache), dispatch, FLOPs. Inference only."""

from __future__ import annotations

from ard_kernels import triton_support
from ard_kernels.backends import register_backend
from ard_kernels.block_causal_attention.torch_impl import as_output, out_like
from ard_kernels.history import cpu, cuda, torch_impl
from ard_kernels.history.norm import HeadNorm, normalise
from ard_kernels.library import define_op

IMPLEMENTATIONS = {
    "cuda": cuda,
    "triton": triton_support.LazyModule("ard_kernels.history.triton_impl"),
    "cpu": cpu,
    "torch": torch_impl,
}

register_backend("history_attention", "cuda", cuda.refuses)
register_backend("history_attention", "triton", triton_support.refuses)
register_backend("history_attention", "cpu", cpu.refuses)
register_backend("history_attention", "torch", torch_impl.refuses)


def norm_fields(norm: HeadNorm | None) -> tuple:
    """`norm` as the op takes it: kind (None: no norm), weight, bias, eps."""
    return (None, None, None, 0.0) if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)


def _norm_of(kind, weight, bias, eps) -> HeadNorm | None:
    return None if kind is None else HeadNorm(kind, weight, bias, eps)


def _history(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, scale, *norms_and_backend):
    *norms, backend = norms_and_backend
    if q.numel() == 0:
        return out_like(q)
    q_norm, k_norm = _norm_of(*norms[:4]), _norm_of(*norms[4:])
    run = IMPLEMENTATIONS[backend].forward
    where = (cache_k, cache_v, workspace, start, sink_stop, window_start, scale)
    if backend == "cuda":  # its append normalises
        return run(q, k, v, *where, q_norm, k_norm)
    return as_output(run(normalise(q, q_norm), normalise(k, k_norm), v, *where))


def _history_fake(q, *_):
    return out_like(q)


def _history_flops(q, k, v, cache_k, cache_v, workspace, start, sink_stop, window_start, *args, **kwargs) -> int:
    B, H, L, D = q
    return 4 * B * H * D * L * (sink_stop + start + L - window_start)


history_op = define_op(
    "history_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) workspace, "
    "SymInt start, SymInt sink_stop, SymInt window_start, float scale, "
    "str? q_norm, Tensor? q_weight, Tensor? q_bias, float q_eps, "
    "str? k_norm, Tensor? k_weight, Tensor? k_bias, float k_eps, str backend) -> Tensor",
    _history,
    _history_fake,
    flops=_history_flops,
)
