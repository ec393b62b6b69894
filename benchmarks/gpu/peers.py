"""What our kernels are measured against: the strongest simple alternatives in PyTorch, and flash-attn if installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels.block_causal_attention.spec import dense_mask, key_ranges
from ard_kernels.segments import segment_offsets
from benchmarks.gpu.cases import MASKS, Case

FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
COMPILED = {"cuda": {"dynamic": False}, "cpu": {"backend": "aot_eager"}}


def gather(x_BHTD: torch.Tensor, ranges) -> torch.Tensor:
    parts = [x_BHTD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def loop_over_segments(case: Case, attend: Callable) -> Callable:
    """One call per segment over the keys it sees; block-diagonal masks are one call with the segments in the batch."""
    window, sink = MASKS[case.mask]
    offsets, L = segment_offsets(list(case.lengths), case.tokens), case.lengths[0]

    def folded(q, k, v):
        q, k, v = (x.unflatten(2, (-1, L)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return attend(q, k, v).unflatten(0, (case.B, -1)).transpose(1, 2).flatten(2, 3)

    def looped(q, k, v):
        outputs = []
        for segment in range(len(offsets) - 1):
            ranges = key_ranges(offsets, segment, window, sink)
            own = q[:, :, offsets[segment] : offsets[segment + 1]]
            outputs.append(attend(own, gather(k, ranges), gather(v, ranges)))
        return torch.cat(outputs, 2)

    return folded if (window, sink) == (1, 0) and len(set(case.lengths)) == 1 else looped


def forced_sdpa(backend: SDPBackend) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def flash_attn(q, k, v):
    """The flash-attn package, (B, H, T, D) in and out."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flex(case: Case, device: torch.device) -> Callable:
    """FlexAttention with a block mask, compiled on a GPU; on the CPU, where it has no backward, plain."""
    (window, sink), L = MASKS[case.mask], case.lengths[0]

    def visible(b, h, query, key):
        own, other = query // L, key // L
        seen = other <= own
        if window is not None:
            seen = seen & ((other > own - window) | (other < sink))
        return seen

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, device=device.type)
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def attention_peers(case: Case, device: torch.device) -> dict[str, Callable]:
    mask = dense_mask(list(case.lengths), case.tokens, *MASKS[case.mask], device)
    peers = {f"sdpa_loop_{name}": loop_over_segments(case, forced_sdpa(backend)) for name, backend in FORCED.items()}
    peers["sdpa_dense_bool"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    peers["flex_compiled"] = flex(case, device)
    peers["flash_attn_loop"] = loop_over_segments(case, flash_attn)
    return peers


def _modulate(x, shift, scale):
    S = shift.shape[1]
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (S, -1))
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def _gate(x, branch, gate):
    S = gate.shape[1]
    h = x.unflatten(1, (S, -1)) + gate.unsqueeze(2) * branch.unflatten(1, (S, -1))
    return h.flatten(1, 2).to(x.dtype)


def _gated(x, branch, gate, shift, scale):
    h = _gate(x, branch, gate)
    return h, _modulate(h, shift, scale)


ADALN_FORMS = {"adaln_modulate": _modulate, "gate_residual_adaln": _gated, "gate_residual": _gate}


def adaln_peers(op: str, device: torch.device) -> dict[str, Callable]:
    """Eager, and compiled eager, with rows kept (B, S, 1, C)."""
    form = ADALN_FORMS[op]
    return {"eager": form, "torch_compile": torch.compile(form, **COMPILED[device.type])}


def history_peers(case: Case, device: torch.device) -> dict[str, Callable]:
    """SDPA over keys and values that are concatenated every step, or held in preallocated memory."""
    L = case.lengths[0]
    memory = [torch.empty(case.B, case.H, case.tokens, case.D, dtype=case.dtype, device=device) for _ in range(2)]

    def steps(q, k, v):
        for start in range(0, case.tokens, L):
            yield start + L, [x[:, :, start : start + L] for x in (q, k, v)]

    def concatenated(attend):
        def run(q, k, v):
            outputs, keys, values = [], q[:, :, :0], q[:, :, :0]
            for _, (own_q, own_k, own_v) in steps(q, k, v):
                keys, values = torch.cat([keys, own_k], 2), torch.cat([values, own_v], 2)
                outputs.append(attend(own_q, keys, values))
            return tuple(outputs)

        return run

    def preallocated(attend):
        def run(q, k, v):
            outputs = []
            for stop, (own_q, own_k, own_v) in steps(q, k, v):
                for held, own in zip(memory, (own_k, own_v), strict=True):
                    held[:, :, stop - L : stop].copy_(own)
                outputs.append(attend(own_q, memory[0][:, :, :stop], memory[1][:, :, :stop]))
            return tuple(outputs)

        return run

    peers = {}
    for name, backend in FORCED.items():
        peers[f"cat_{name}"] = concatenated(forced_sdpa(backend))
        peers[f"preallocated_{name}"] = preallocated(forced_sdpa(backend))
    return peers
