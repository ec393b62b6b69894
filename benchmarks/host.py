"""`python -m benchmarks.host`: what a call costs on the host, in us, on the way to a GPU kernel that is not launched.

Triton's driver names an H100 and has a launcher that does nothing; the CUDA module's functions do nothing either. So no
GPU is needed, and what is left is the Python of this library, PyTorch's allocations and autograd, and Triton's. Small
shapes: DiT-XL/2 heads, L 64, S 4, bf16. Thread CPU time, the least of many rounds: the machine may be busy.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from triton.runtime import driver

from ard_kernels import (
    HistoryCache,
    adaln_modulate,
    block_causal_attention,
    block_causal_attention_packed,
    gate_residual_adaln,
    history_attention,
)
from ard_kernels.common import extension
from ard_kernels.common.backends import _refusals
from testing.no_gpu import Nothing

B, H, D, L, S = 1, 16, 72, 64, 4
T, C = S * L, H * D
ROUNDS, CALLS = 100, 20


def calls(backend: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    how = {"segment_length": L, "backend": backend}
    qkv = torch.randn(B, T, 3, H, D).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    x, branch = torch.randn(2, B, T, C).bfloat16()
    shift, scale, gate = torch.randn(B, S, 3 * C).bfloat16().chunk(3, -1)
    cache = HistoryCache(1, B, H, D, T, torch.bfloat16)
    steps = itertools.cycle(enumerate(zip(*(x.split(L, 2) for x in (q, k, v)), strict=True)))

    def with_backward(run: Callable, x: torch.Tensor) -> Callable[[], object]:
        leaf = x.clone().requires_grad_()

        def both():
            out = run(leaf)
            return torch.autograd.grad(out, leaf, out)

        return both

    def sample():
        step, segment = next(steps)
        if step == 0:
            cache.reset()
        history_attention(*segment, cache, layer=0, backend=backend)

    def packed(qkv):
        return block_causal_attention_packed(qkv, **how)

    def modulate(x):
        return adaln_modulate(x, shift, scale, **how)

    def gated(x):
        return gate_residual_adaln(x, branch, gate, shift, scale, **how)

    return {
        "block_causal_attention": lambda: block_causal_attention(q, k, v, **how),
        "block_causal_attention_packed, forward and backward": with_backward(packed, qkv),
        "adaln_modulate": lambda: modulate(x),
        "adaln_modulate, forward and backward": with_backward(modulate, x),
        "gate_residual_adaln": lambda: gated(x),
        "gate_residual_adaln, forward and backward": with_backward(gated, x),
        "history_attention": sample,
    }


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(CALLS):
        run()
    rounds = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            run()
        rounds.append((time.thread_time() - begin) / CALLS)
    return min(rounds) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(Nothing())
    extension.emulated = Nothing()
    for refusals in _refusals.values():  # Triton's would ask for its interpreter
        refusals["triton"] = lambda *_: None
    for backend in ("triton", "cuda"):
        for name, run in calls(backend).items():
            print(f"{backend:<7} {name:<52} {microseconds(run):6.1f} us")


if __name__ == "__main__":
    main()
