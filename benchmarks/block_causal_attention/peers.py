"""What attention over segments is measured against: the strongest alternatives in PyTorch, and packages for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ard_kernels import SegmentMask
from ard_kernels.block_causal_attention.mask import Run
from ard_kernels.block_causal_attention.spec import visibility
from testing.cases import Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Implementations behind scaled_dot_product_attention, by device.
FORCED = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
# Modules of the flash-attn packages, generations 2, 3 and 4.
FLASH_ATTN = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
BLOCK = 256, 128  # tokens of q and k: the least that FlashAttention-4 lists on Hopper and on Blackwell


def seen_by_query(case: Case) -> list[tuple[Run, list[Run]]]:
    """Of each segment: its tokens, and the ranges of tokens it sees."""
    seen = visibility(case.segments, case.tokens, case.tokens)
    return list(zip(pairwise(seen.q_offsets), seen.keys, strict=True))


def gather(x: Tensor, ranges: list[Run], dim: int = 2) -> Tensor:
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def loop_over_segments(case: Case, attend: Attend) -> Attend:
    """One call per segment over the keys it sees; block-diagonal masks are one call with the segments in the batch."""
    seen, L, count = seen_by_query(case), case.lengths[0], len(case.lengths)

    def folded(q, k, v):
        q, k, v = (x.unflatten(2, (-1, L)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return attend(q, k, v).unflatten(0, (case.B, -1)).transpose(1, 2).flatten(2, 3)

    def looped(q, k, v):
        outputs = [attend(gather(q, [rows]), gather(k, ranges), gather(v, ranges)) for rows, ranges in seen]
        return torch.cat(outputs, 2)

    diagonal = case.segment_mask == SegmentMask.block_causal(count, window=1)
    return folded if diagonal and len(set(case.lengths)) == 1 else looped


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def forced_sdpa(backend: SDPBackend) -> Attend:
    def attend(q, k, v):
        with sdpa_kernel([backend]):
            return sdpa(q, k, v)

    return attend


def sdpa_by_name(device: torch.device) -> dict[str, Attend]:
    """PyTorch's implementations. On the CPU flash is its own choice, and asking for it would cost a call 30 us."""
    forced = {name: forced_sdpa(backend) for name, backend in FORCED[device.type].items()}
    return forced | {"flash": sdpa} if device.type == "cpu" else forced


def output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some return it alone, some with a log-sum-exp."""
    return returned[0] if isinstance(returned, tuple) else returned


def flash_attn_loop(case: Case, package: str) -> Attend:
    """A flash-attn package, (B, H, T, D) in and out."""
    call = importlib.import_module(FLASH_ATTN[package]).flash_attn_func
    return loop_over_segments(
        case, lambda q, k, v: output(call(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)
    )


def block_lists(sees: Tensor) -> tuple[Tensor, Tensor]:
    """Of bools (rows, columns): the count of columns of each row, (1, 1, rows), and which, (1, 1, rows, columns)."""
    counts, order = sees.sum(-1, dtype=torch.int32), sees.int().argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], order.int()[None, None]


def flash_attn_4_sparse(case: Case, device: torch.device) -> Attend:
    """FlashAttention-4's block-sparse kernels, of masks whose blocks are seen whole.

    Raises:
        ValueError: some are not: FlashAttention-4 wants the mask as a function of CuTe DSL then; `flex_flash` has one.
    """
    call = importlib.import_module(FLASH_ATTN["flash_attn_4"]).flash_attn_func
    blocks = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    if any(length % BLOCK[0] for length in case.lengths):
        raise ValueError(f"segments of {set(case.lengths)} tokens; blocks seen whole need multiples of {BLOCK[0]}")
    rows, columns = ([length // size for length in case.lengths] for size in BLOCK)
    sees = case.segment_mask.dense(rows, columns, device=device)

    def tables(sees: Tensor):
        counts, order = block_lists(sees)
        return blocks(torch.zeros_like(counts), torch.zeros_like(order), counts, order, block_size=BLOCK)

    how = {"block_sparse_tensors": tables(sees), "block_sparse_tensors_bwd": tables(sees.T)}
    return lambda q, k, v: output(call(*(x.transpose(1, 2) for x in (q, k, v)), **how)).transpose(1, 2)


def varlen(case: Case, device: torch.device, attend: Callable[..., Tensor]) -> Attend:
    """One packed call: a sequence for each segment of the batch, over a copy of the keys and values it sees.

    attend: of q, k, v (tokens, heads, D), first tokens of the sequences in q and in k (int32), most tokens of each.
    """
    seen = seen_by_query(case)
    counts = [sum(stop - start for start, stop in ranges) for _, ranges in seen]
    every_range = [run for _, ranges in seen for run in ranges]
    starts_q, starts_k = (
        torch.tensor([0, *accumulate(lengths * case.B)], dtype=torch.int32, device=device)
        for lengths in (list(case.lengths), counts)
    )

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (gather(x, every_range, 1).flatten(0, 1) for x in (k, v))
        out = attend(q.flatten(0, 1), k, v, starts_q, starts_k, max(case.lengths), max(counts))
        return out.unflatten(0, (case.B, -1)).transpose(1, 2)

    return run


def torch_varlen(case: Case, device: torch.device) -> Attend:
    """PyTorch's own packed call."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen(case, device, lambda *packed: varlen_attn(*packed, enable_gqa=case.key_heads != case.H))


def flash_attn_varlen(case: Case, device: torch.device, package: str) -> Attend:
    call = importlib.import_module(FLASH_ATTN[package]).flash_attn_varlen_func
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return varlen(case, device, lambda q, k, v, *packed: output(call(q, k, v, **dict(zip(names, packed, strict=True)))))


def magi(case: Case, device: torch.device) -> Attend:
    """MagiAttention's flexible flash attention: pairs of a query range and a key range, the batch end to end."""
    from magi_attention.api import flex_flash_attn_func

    pairs = [
        [start + b * case.tokens for start in (*rows, *run)]
        for b in range(case.B)
        for rows, ranges in seen_by_query(case)
        for run in ranges
    ]
    q_ranges, k_ranges = torch.tensor(pairs, dtype=torch.int32, device=device).split(2, 1)
    ranges = {"q_ranges": q_ranges.contiguous(), "k_ranges": k_ranges.contiguous()}
    ranges["attn_type_map"] = torch.zeros(len(pairs), dtype=torch.int32, device=device)  # 0: all pairs of both ranges

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
        out, *_ = flex_flash_attn_func(q, k, v, **ranges)
        return out.to(q.dtype).unflatten(0, (case.B, -1)).transpose(1, 2)

    return run


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()  # sysconf leaves out what the page cache would give
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def dense(case: Case, device: torch.device, *, additive: bool) -> Attend:
    """One call under a (T, T) mask, bool or with 0 and -inf.

    Raises:
        MemoryError: the mask, and what PyTorch adds to the scores, would take more than half of the free memory.
    """
    needed, free = case.tokens**2 * (1 + case.dtype.itemsize), free_bytes(device)
    if needed > free // 2:
        raise MemoryError(f"a mask of {case.tokens} x {case.tokens} takes {needed / 1e9:.1f} of {free / 1e9:.1f} GB")
    mask = case.segment_mask.dense(case.lengths, device=device)
    if additive:
        mask = torch.zeros(mask.shape, dtype=case.dtype, device=device).masked_fill(~mask, float("-inf"))
    return lambda q, k, v: sdpa(q, k, v, mask)


def flex(case: Case, device: torch.device, kernel: str | None = None, **compiled) -> Attend:
    """FlexAttention with a block mask that looks up the ranges each query sees; compiled where told how."""
    seen = seen_by_query(case)
    most = max(len(ranges) for _, ranges in seen)
    table = [[*ranges, *[(0, 0)] * (most - len(ranges))] for _, ranges in seen]  # (segments, most, 2)
    lengths = torch.tensor(case.lengths, device=device)
    bounds = torch.tensor(table, device=device).repeat_interleave(lengths, 0).permute(1, 2, 0).contiguous()

    def visible(b, h, query, key):
        sees = (bounds[0, 0][query] <= key) & (key < bounds[0, 1][query])
        for i in range(1, most):
            sees = sees | ((bounds[i, 0][query] <= key) & (key < bounds[i, 1][query]))
        return sees

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, device=device.type)
    run = torch.compile(flex_attention, dynamic=False, **compiled) if compiled else flex_attention
    how = {"enable_gqa": case.key_heads != case.H, "kernel_options": {"BACKEND": kernel} if kernel else None}
    return lambda q, k, v: run(q, k, v, block_mask=mask, **how)


def flex_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Attend]]:
    """In the default mode; on a GPU also as its users run it, and on FlashAttention-4. No backward on the CPU."""
    if not compiled:
        return {"flex": lambda: flex(case, device)}
    peers = {"flex_compiled": lambda: flex(case, device, mode="default")}
    if device.type == "cuda":
        tuned = "max-autotune-no-cudagraphs"
        peers["flex_max_autotune"] = lambda: flex(case, device, mode=tuned)
        peers["flex_flash"] = lambda: flex(case, device, "FLASH", mode="default")
    return peers


def attention_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Attend]]:
    """Makers by name: a peer that cannot be made is refused with the reason."""
    peers = {
        f"sdpa_loop_{name}": partial(loop_over_segments, case, attend) for name, attend in sdpa_by_name(device).items()
    }
    peers["sdpa_dense_bool"] = lambda: dense(case, device, additive=False)
    peers["sdpa_dense_float"] = lambda: dense(case, device, additive=True)
    peers |= flex_peers(case, device, compiled)
    for package in FLASH_ATTN if device.type == "cuda" else ("flash_attn",):
        peers[f"{package}_loop"] = partial(flash_attn_loop, case, package)
    if device.type == "cuda":
        for package in FLASH_ATTN:
            peers[f"{package}_varlen"] = partial(flash_attn_varlen, case, device, package)
        peers["torch_varlen"] = lambda: torch_varlen(case, device)
        peers["flash_attn_4_sparse"] = lambda: flash_attn_4_sparse(case, device)
        peers["magi_attention"] = lambda: magi(case, device)
    return peers
