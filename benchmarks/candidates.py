"""The configurations worth trying for each key of `ard_kernels.tuning`: `make aot` chooses from them, the tuner times.

From large tiles and deep pipelines to what fits in registers. A query or key tile of 128 rows is 2 warpgroups of wgmma;
64 columns leave room for 2 thread blocks on a multiprocessor, so that one's softmax overlaps the other's matmuls.
"""

from __future__ import annotations

from collections.abc import Iterator

from ard_kernels import tuning

ATTENTION = ("attention_forward", "attention_backward_dq", "attention_backward_dkv", "attention_history")
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
    return names


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Constants to try for `key`, best guess first."""
    kernel, bits, _, length = key.split("/")
    if bits == "32bit":
        blocks = _FP32
    elif length == "short" or kernel == "attention_history":  # one segment's queries: few tiles, so small ones
        blocks = _SHORT
    else:
        blocks = _LONG + _SHORT
    for values in blocks:
        yield dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))
