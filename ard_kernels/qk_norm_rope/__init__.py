"""RMSNorm or LayerNorm of q and k, then rotary embedding, in one pass over memory."""

from __future__ import annotations

import torch

from ard_kernels.common.arguments import NORM_EPS, described
from ard_kernels.common.autocast import cast_to_autocast
from ard_kernels.common.backends import resolve
from ard_kernels.common.self_check import register_trials
from ard_kernels.qk_norm_rope import spec
from ard_kernels.qk_norm_rope.op import OP, forward_op
from ard_kernels.qk_norm_rope.trials import UNIT

register_trials(UNIT, UNIT.op)

__all__ = ["qk_norm_rope", "qk_norm_rope_packed"]


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    norm: str | None = "rms",
    over: str = "head",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    eps: float = NORM_EPS,
    pairs: str = "interleaved",
    segment_length: int | None = None,
    layout: str = "bhtd",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q and k normalised, then turned by their positions; what attention models do before scores.

    Args:
        q: (B, H, T, D), or (B, T, H, D) with layout "bthd"; fp32, bf16 or fp16 (fp64 on the torch backend), D a
            multiple of 8 up to 256, at most 32 * (256 // D) heads. Any strides with a contiguous last dim are read in
            place.
        k: like q, its number of heads H_kv its own; None: q alone.
        cos, sin: rotary tables, both or none; fp32 or q's dtype, constants. (T, P) per token, (B, T, P) per sample and
            token, (B, T, H, P) per head too (B, H: 1 broadcasts). P <= D / 2 pairs turn, the elements past 2 P stay.
            Positions of any number of axes are in how the tables are made.
        norm: "rms", "layer" or None. Statistics over D for each head (over="head"), or over all H * D channels of the
            token (over="all").
        q_weight, k_weight: (D,), over="all" (H * D,) in the order (H, D); q's dtype or fp32; None: 1.
        q_bias, k_bias: the same, with norm "layer" only; None: 0.
        eps: added to the mean square; >= 0.
        pairs: "interleaved", pair i is (2i, 2i + 1); "half", (i, i + P).
            y_a = x_a cos_i - x_b sin_i, y_b = x_b cos_i + x_a sin_i.
        segment_length: tokens per segment L (T = S * L); the tables have L rows then, which every segment reads.
        backend: None chooses; see `ard_kernels.backends()`.

    Returns:
        (q, k), or q where k is None: their shape, layout and dtype, memory ordered (B, T, H, D). Arithmetic is fp32 and
        the result is rounded once. Under autocast q and k are cast to its dtype first, as attention does.

    Raises:
        ValueError: a shape, dtype, device, setting or backend outside this contract.

    Sources: RoPE, arXiv 2104.09864; the norm over all heads, Wan (arXiv 2503.20314); per head, arXiv 2302.05442.
    """
    if not isinstance(layout, str) or layout not in spec.LAYOUTS:
        raise ValueError(f"{OP}: layout is {described(layout)}; expected 'bhtd' or 'bthd'")
    spec.check_x(OP, "q", q, layout)
    each = [q]
    if k is not None:
        spec.check_pair(OP, q, k, layout)
        each.append(k)
    elif k_weight is not None or k_bias is not None:
        raise ValueError(f"{OP}: k_{'bias' if k_weight is None else 'weight'} is given; expected None without k")
    rule = spec.check_rule(OP, norm, over, pairs, eps)
    each = list(cast_to_autocast(*each))
    head_dim, token_dim = layout.index("h"), layout.index("t")
    heads = tuple(x.shape[head_dim] for x in each)
    B, T = q.shape[0], q.shape[token_dim]
    tables = spec.check_tables(OP, cos, sin, segment_length, each[0], B, T, heads) or (None, None)
    done = []
    named = (("q", q_weight, q_bias), ("k", k_weight, k_bias))[: len(each)]
    for x, count, (name, weight, bias) in zip(each, heads, named, strict=True):
        spec.check_parameter(OP, f"{name}_weight", weight, rule, count, x)
        spec.check_parameter(OP, f"{name}_bias", bias, rule, count, x)
        done.append((x, weight, None, bias, None))
    chosen = resolve(OP, backend, q.device, each[0].dtype, max(heads) * q.shape[-1])
    outputs = []
    for x, *parameters in done:
        x = spec.dense_last(x if layout == "bhtd" else x.transpose(1, 2))
        y = forward_op(x, *map(_dense, parameters), *tables, *rule, chosen)[0]
        outputs.append(y if layout == "bhtd" else y.transpose(1, 2))
    return outputs[0] if k is None else (outputs[0], outputs[1])


def _dense(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.contiguous()


def qk_norm_rope_packed(
    qkv: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    norm: str | None = "rms",
    over: str = "head",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    eps: float = NORM_EPS,
    pairs: str = "interleaved",
    segment_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`qk_norm_rope` of one packed projection (B, T, 3, H, D): its q and k done, its v copied.

    Args:
        qkv: (B, T, 3, H, D), any strides with a contiguous last dim.
        others: as in `qk_norm_rope`.

    Returns:
        (B, T, 3, H, D) contiguous: what `block_causal_attention_packed` takes. Its gradient comes back packed.

    Raises:
        ValueError: as `qk_norm_rope`.
    """
    op = "qk_norm_rope_packed"
    spec.check_x(op, "qkv", qkv, "packed")
    rule = spec.check_rule(op, norm, over, pairs, eps)
    (qkv,) = cast_to_autocast(qkv)
    B, T, _, H, D = qkv.shape
    tables = spec.check_tables(op, cos, sin, segment_length, qkv, B, T, (H,)) or (None, None)
    parameters = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, parameter in parameters.items():
        spec.check_parameter(op, name, parameter, rule, H, qkv)
    chosen = resolve(OP, backend, qkv.device, qkv.dtype, H * D)
    return forward_op(spec.dense_last(qkv), *map(_dense, parameters.values()), *tables, *rule, chosen)[0]
