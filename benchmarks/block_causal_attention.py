"""Block-causal attention on the CPU against the SDPA loop over prefix keys and one densely masked SDPA call.

q, k, v are views of one packed qkv projection, as in the model; H 16, S 4, batch 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ard_kernels import block_causal_attention
from ard_kernels.block_causal_attention.spec import dense_mask
from benchmarks.harness import interleaved, keep_freed_memory, print_rows, row, write_results

H, S = 16, 4
CASES = [(256, 72, 20), (256, 64, 20), (64, 72, 60), (16, 72, 400), (16, 64, 400), (4, 72, 400)]  # L, D, repeats


def sdpa_loop(q, k, v, L):
    outputs = [
        F.scaled_dot_product_attention(q[:, :, i * L : (i + 1) * L], k[:, :, : (i + 1) * L], v[:, :, : (i + 1) * L])
        for i in range(S)
    ]
    return torch.cat(outputs, 2)


def bench_case(L: int, D: int, repeats: int) -> list[dict]:
    qkv = torch.randn(1, S * L, 3, H, D, requires_grad=True)
    mask = dense_mask([L], S * L, None, 0)
    additive = torch.zeros(S * L, S * L).masked_fill(~mask, float("-inf"))
    candidates = {
        "ours": lambda q, k, v: block_causal_attention(q, k, v, segment_length=L),
        "sdpa_loop": lambda q, k, v: sdpa_loop(q, k, v, L),
        "sdpa_dense_float": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=additive),
        "sdpa_dense_bool": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    grad_out = torch.randn(1, H, S * L, D)

    def forward(function):
        return function(*(x.transpose(1, 2) for x in qkv.unbind(2)))

    def both(function):
        return torch.autograd.grad(forward(function), qkv, grad_out)

    for name, function in candidates.items():
        for run in (forward, both):
            got, expected = run(function), run(candidates["ours"])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    shape = f"H{H} S{S} L{L} D{D}"
    peers = [name for name in candidates if name != "ours"]
    with torch.no_grad():
        timings = interleaved({n: (lambda f=f: forward(f)) for n, f in candidates.items()}, repeats)
    results = [row("block_causal_attention", shape, "forward", timings, "ours", peers, 1.0)]
    timings = interleaved({n: (lambda f=f: both(f)) for n, f in candidates.items()}, repeats)
    results.append(row("block_causal_attention", shape, "forward+backward", timings, "ours", peers, 1.1))
    return results


def main() -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    results = [result for case in CASES for result in bench_case(*case)]
    print_rows(results)
    write_results("block_causal_attention", results)


if __name__ == "__main__":
    main()
