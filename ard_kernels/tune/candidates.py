"""The configurations worth trying for each key of common/tuning.py: `make aot` chooses from them, the tuner times.

Attention: from large tiles and deep pipelines to what fits in registers. A tile of 128 rows is 2 warpgroups of wgmma;
64 columns leave room for 2 thread blocks on a multiprocessor, one's softmax beside the other's matmuls.

adaLN: one token at a time, in as few warps as hold a row in registers: fewer barriers per row. Chunks long enough that
reading the rows (forward) and writing partial sums (backward) adds little to the tokens' bytes. STAGES 3 loads two
tokens ahead.

qk_norm_rope: a token's channels in as few warps as have the registers, 16 channels a thread forward and 8 backward,
where sums for weight and bias stand beside them. Programs a multiprocessor: some waves of them forward, so that the
last one costs little; backward one, as each writes a row of sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from ard_kernels.common import tuning

ATTENTION = ("attention_forward", "attention_backward_dq", "attention_backward_dkv", "attention_history")
ADALN = ("adaln_forward", "adaln_backward")
ROPE = ("rope_forward", "rope_backward")
# BLOCK_M, BLOCK_N, num_warps, num_stages
_LONG = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (128, 32, 8, 2)]
_SHORT = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2)]
_FP32 = [(64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)]


def keys() -> list[str]:
    """Every key a table has."""
    names = []
    for kernel in ATTENTION:
        for width in tuning.WIDTHS["attention"]:
            names += [f"{kernel}/16bit/{width}/{length}" for length in ("short", "long")]
            names.append(f"{kernel}/32bit/{width}/long")
    for kernel in ADALN:
        names += [f"{kernel}/{bits}bit/{width}/long" for bits in (16, 32) for width in tuning.WIDTHS["adaln"]]
    for kernel in ROPE:
        names += [f"{kernel}/{bits}bit/{width}/long" for bits in (16, 32) for width in tuning.WIDTHS["rope"]]
    return names


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Constants to try for `key`, best guess first."""
    kernel, bits, width, length = key.split("/")
    if kernel in ADALN:
        yield from _adaln(kernel, int(width))
        return
    if kernel in ROPE:
        yield from _rope(kernel, int(width))
        return
    if bits == "32bit":
        blocks = _FP32
    elif kernel == "attention_history":  # one segment's queries: few tiles, so small ones first
        blocks = _SHORT + (_LONG if length == "long" else [])  # large ones read a long cache less often
    elif length == "short":
        blocks = _SHORT
    else:
        blocks = _LONG + _SHORT
    for values in blocks:
        yield dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))


def _adaln(kernel: str, width: int) -> Iterator[dict[str, int]]:
    backward = kernel == "adaln_backward"
    least = min(8, width // 288) if backward else width // 576
    warps = [w for w in (1, 2, 4, 8, 16, 32) if w >= least]
    tokens = 64 if backward else 32
    few, more = warps[:2]
    choices = [(tokens, 1, 1, w) for w in warps[:3]] + [(tokens, 1, 3, few), (tokens, 1, 3, more)]
    for values in [*choices, (tokens // 2, 1, 1, few), (tokens, 2, 1, more)]:
        yield dict(zip(("TOKENS", "ROWS", "STAGES", "num_warps"), values, strict=True))


def _rope(kernel: str, width: int) -> Iterator[dict[str, int]]:
    backward = kernel == "rope_backward"
    few = max(1, width // (32 * (8 if backward else 16)))
    warps = [w for w in (few, 2 * few, few // 2) if 1 <= w <= 32]
    for stages, num_warps in [(1, w) for w in warps] + [(3, w) for w in warps[:2]]:
        for threads in (768, 1536) if backward else (4096, 2048):
            blocks = max(1, threads // (32 * num_warps))
            yield dict(zip(("BLOCKS", "STAGES", "num_warps"), (blocks, stages, num_warps), strict=True))
