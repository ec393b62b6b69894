"""What block-causal attention is measured against: the strongest simple alternatives in PyTorch, and flash-attn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels.block_causal_attention.spec import dense_mask, key_ranges
from ard_kernels.common.segments import segment_offsets
from testing.cases import MASKS, Case

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Implementations behind scaled_dot_product_attention, by device.
FORCED = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}


def gather(x_BHTD: torch.Tensor, ranges) -> torch.Tensor:
    parts = [x_BHTD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def loop_over_segments(case: Case, attend: Attend) -> Attend:
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


def forced_sdpa(backend: SDPBackend) -> Attend:
    def attend(q, k, v):
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def flash_attn_loop(case: Case) -> Attend:
    """The flash-attn package, (B, H, T, D) in and out."""
    from flash_attn import flash_attn_func

    return loop_over_segments(
        case, lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    )


def dense(case: Case, device: torch.device, *, additive: bool) -> Attend:
    """One call under a (T, T) mask, bool or with 0 and -inf."""
    mask = dense_mask(list(case.lengths), case.tokens, *MASKS[case.mask], device)
    if additive:
        mask = torch.zeros(mask.shape, dtype=case.dtype, device=device).masked_fill(~mask, float("-inf"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(case: Case, device: torch.device, compiled: bool) -> Attend:
    """FlexAttention with a block mask."""
    (window, sink), L = MASKS[case.mask], case.lengths[0]

    def visible(b, h, query, key):
        own, other = query // L, key // L
        seen = other <= own
        if window is not None:
            seen = seen & ((other > own - window) | (other < sink))
        return seen

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, device=device.type)
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def attention_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Attend]]:
    """Makers by name: a peer that cannot be made is refused with the reason."""
    peers = {
        f"sdpa_loop_{name}": lambda backend=backend: loop_over_segments(case, forced_sdpa(backend))
        for name, backend in FORCED[device.type].items()
    }
    peers["sdpa_dense_bool"] = lambda: dense(case, device, additive=False)
    peers["sdpa_dense_float"] = lambda: dense(case, device, additive=True)
    peers["flex_compiled" if compiled else "flex"] = lambda: flex(case, device, compiled)
    peers["flash_attn_loop"] = lambda: flash_attn_loop(case)
    return peers
