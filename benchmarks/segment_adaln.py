"""The adaLN family on the CPU against eager PyTorch and both useful forms of torch.compile, at 4 x 1024 x 1152 fp32.

The forms differ in how a row (B, S, C) meets its L tokens: `rows` views x as (B, S, L, C) and broadcasts (B, S, 1, C),
`repeat` spreads the rows with repeat_interleave. Rows are strided chunks of one projection, as in the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ard_kernels import adaln_modulate, gate_residual_adaln
from benchmarks.harness import interleaved, keep_freed_memory, print_rows, row, write_results

B, T, S, C = 4, 1024, 4, 1152
L = T // S
EPS = 1e-6


def modulate_rows(x, shift, scale):
    y = F.layer_norm(x, (C,), eps=EPS).unflatten(1, (S, L))
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def modulate_repeat(x, shift, scale):
    return F.layer_norm(x, (C,), eps=EPS) * (1 + scale.repeat_interleave(L, 1)) + shift.repeat_interleave(L, 1)


def gated_rows(x, branch, gate, shift, scale):
    h = (x.unflatten(1, (S, L)) + gate.unsqueeze(2) * branch.unflatten(1, (S, L))).flatten(1, 2)
    return h, modulate_rows(h, shift, scale)


def gated_repeat(x, branch, gate, shift, scale):
    h = x + gate.repeat_interleave(L, 1) * branch
    return h, modulate_repeat(h, shift, scale)


def gradient(function, tensors, rows, count, grad_outputs):
    """Forward and backward down to the tensors and to the one projection that the rows are chunks of."""
    outputs = function(*tensors, *rows.chunk(6, -1)[:count])
    return torch.autograd.grad(outputs, (*tensors, rows), grad_outputs)


def bench_op(op, forms, ours, tensors, rows, count, targets, repeats):
    outputs = ours(*tensors, *rows.chunk(6, -1)[:count])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad_outputs = tuple(torch.randn_like(y) for y in outputs)
    candidates = {"ours": ours, "eager": forms["rows"]}
    candidates |= {f"compile_{name}": torch.compile(form) for name, form in forms.items()}
    expected = gradient(ours, tensors, rows, count, grad_outputs)
    for name, candidate in candidates.items():
        got = gradient(candidate, tensors, rows, count, grad_outputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2, msg=lambda m, name=name: f"{name}: {m}")
    destination = torch.empty_like(tensors[0])
    peers = [name for name in candidates if name != "ours"]

    with torch.no_grad():
        runs = {n: (lambda f=f: f(*tensors, *rows.chunk(6, -1)[:count])) for n, f in candidates.items()}
        runs["copy"] = lambda: destination.copy_(tensors[0])
        forward = interleaved(runs, repeats)
    runs = {n: (lambda f=f: gradient(f, tensors, rows, count, grad_outputs)) for n, f in candidates.items()}
    runs["copy"] = lambda: destination.copy_(tensors[0].detach())
    both = interleaved(runs, repeats)

    shape = f"{B}x{T}x{C} S{S}"
    megabytes = {"adaln_modulate": (2, 5), "gate_residual_adaln": (4, 10)}[op]  # tensors moved: forward, both
    results = []
    for direction, timings, target, moved in zip(
        ("forward", "forward+backward"), (forward, both), targets, megabytes, strict=True
    ):
        copy_rate = 2 / timings["copy"].median
        share = moved / timings["ours"].median / copy_rate
        results.append(row(op, shape, direction, timings, "ours", peers, target, fraction_of_copy_rate=share))
    return results


def main(repeats: int = 60) -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    x, branch = (torch.randn(B, T, C, requires_grad=True) for _ in range(2))
    rows = torch.randn(B, S, 6 * C, requires_grad=True)
    results = bench_op(
        "adaln_modulate",
        {"rows": modulate_rows, "repeat": modulate_repeat},
        lambda x, shift, scale: adaln_modulate(x, shift, scale, segment_length=L),
        (x,),
        rows,
        2,
        (1.5, 2.5),
        repeats,
    )
    results += bench_op(
        "gate_residual_adaln",
        {"rows": gated_rows, "repeat": gated_repeat},
        lambda *tensors: gate_residual_adaln(*tensors, segment_length=L),
        (x, branch),
        rows,
        3,
        (1.5, 2.5),
        repeats,
    )
    print_rows(results)
    write_results("segment_adaln", results)


if __name__ == "__main__":
    main()
