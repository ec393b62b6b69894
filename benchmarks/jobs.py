"""What is measured: design section 6's rows for GPUs and CPUs, with the useful work of each."""

from __future__ import annotations

import torch

from ard_kernels.block_causal_attention.spec import useful_pairs
from benchmarks.measure import Job
from testing.cases import ADALN, ATTENTION, MASKS, PACKED, Case

# (B, T, C) tensors any kernel must read or write, and FLOPs per element of one: forward, backward.
ADALN_WORK = {
    "adaln_modulate": ((2, 3), (8, 15)),
    "gate_residual_adaln": ((4, 6), (10, 19)),
    "gate_residual": ((3, 3), (2, 4)),
}
PASSES = {"forward": (0,), "backward": (1,), "forward+backward": (0, 1)}


def attention_job(
    B, L, D, mask, direction, target, rate_target=None, S=4, H=16, op=ATTENTION[0], dtype=torch.bfloat16
) -> Job:
    """2 matmuls forward, 5 backward; q, k, v, out and their gradients moved once."""
    case = Case(op, B, (L,) * S, H=H, D=D, mask=mask, dtype=dtype)
    matmuls, tensors = (sum(counts[i] for i in PASSES[direction]) for counts in ((2, 5), (4, 8)))
    flops = matmuls * 2 * B * H * D * useful_pairs([L], case.tokens, *MASKS[mask])
    nbytes = tensors * B * H * D * case.tokens * dtype.itemsize
    return Job(case, direction, target, flops, nbytes, "TFLOP/s", rate_target)


def adaln_job(op, B, L, C, row_dtype, direction, target=None, fraction_target=None, S=4, dtype=torch.bfloat16) -> Job:
    case = Case(op, B, (L,) * S, C=C, dtype=dtype, row_dtype=row_dtype)
    tensors, flops = (sum(counts[i] for i in PASSES[direction]) for counts in ADALN_WORK[op])
    elements = B * case.tokens * C
    if target is None:  # the GPU's
        target, fraction_target = (1.2, 0.90) if direction == "forward" else (1.5, 0.75)
    return Job(
        case, direction, target, flops * elements, tensors * elements * dtype.itemsize, "GB/s",
        fraction_target=fraction_target,
    )  # fmt: skip


def history_job(B, D=72, L=256, S=4, H=16, dtype=torch.bfloat16) -> Job:
    """All S steps of one layer: append and attend."""
    case = Case("history_attention", B, (L,) * S, H=H, D=D, dtype=dtype)
    flops = 4 * B * H * D * useful_pairs([L], case.tokens, None, 0)
    read = sum(range(1, S + 1)) * L  # keys of each step
    nbytes = 2 * B * H * D * (case.tokens * 3 + read) * dtype.itemsize  # q and out; k, v in and appended; keys, values
    return Job(case, "forward", 1.0, flops, nbytes, "TFLOP/s")


def gpu_jobs(dry: bool = False) -> list[Job]:
    """The rows of design section 6, the model's own shapes first."""
    ways = ("forward", "backward")
    if dry:
        found = [attention_job(1, 16, 64, "M4", way, 1.3, S=2, H=1) for way in ways]
        found += [adaln_job(op, 1, 16, 24, torch.float32, way, S=2) for op in ADALN[:2] for way in ways]
        found += [attention_job(1, 16, 64, "M3", "backward", 1.3, S=2, H=1, op=PACKED)]
        return [*found, history_job(1, 64, L=16, S=2, H=1)]
    found = [attention_job(32, 256, 72, "M4", way, 1.3, rate) for way, rate in zip(ways, (450.0, 330.0), strict=True)]
    found += [adaln_job(op, 32, 256, 1152, torch.float32, way) for op in ADALN[:2] for way in ways]
    found += [attention_job(32, 256, 72, "M4", way, 1.3, op=PACKED) for way in ways]
    found += [history_job(B) for B in (1, 32)]
    found += [adaln_job(op, 32, 256, 1152, torch.bfloat16, way) for op in ADALN[:2] for way in ways]
    found += [attention_job(8, 1024, 72, "M4", way, 1.1) for way in ways]
    found += [attention_job(32, 256, D, "M4", way, 1.0) for D in (64, 128) for way in ways]
    found += [attention_job(2, 4096, 72, "M4", way, 1.1) for way in ways]
    found += [attention_job(32, 256, 72, "M1", way, 1.0) for way in ways]
    found += [attention_job(1, 256, 72, "M4", way, 1.0) for way in ways]
    found += [
        attention_job(B, L, D, "M4", way, 1.0) for B, L in ((8, 1024), (2, 4096)) for D in (64, 128) for way in ways
    ]
    found += [
        adaln_job("gate_residual", 32, 256, 1152, dtype, way)
        for dtype in (torch.float32, torch.bfloat16)
        for way in ways
    ]
    # Shape classes of their own, for the automatic choice.
    found += [history_job(B, D) for D in (64, 128) for B in (1, 32)]
    found += [attention_job(32, 256, 96, "M4", way, 1.0) for way in ways]
    found += [history_job(B, 96) for B in (1, 32)]
    found += [adaln_job(op, 32, 256, C, torch.float32, way) for C in (384, 4096) for op in ADALN for way in ways]
    return found


def cpu_jobs() -> list[Job]:
    """fp32: attention at every size as fast as the best peer, 1.1x with the backward; adaLN 1.5x and 2.5x."""
    fp32, both = {"dtype": torch.float32}, ("forward", "forward+backward")
    goals = {"forward": 1.0, "forward+backward": 1.1}
    shapes = [(256, 72, 16), (256, 64, 16), (64, 72, 16), (16, 72, 16), (4, 72, 16)]  # L, D, H
    found = [attention_job(1, L, D, "M4", way, goals[way], H=H, **fp32) for L, D, H in shapes for way in both]
    found += [attention_job(1, 256, 72, "M4", way, goals[way], op=PACKED, **fp32) for way in both]
    found += [attention_job(1, 256, 72, mask, "forward", 1.0, **fp32) for mask in ("M1", "M3")]
    found += [attention_job(1, 1024, 72, "M4", way, 1.0, H=4, **fp32) for way in both]
    goals = {"forward": 1.5, "forward+backward": 2.5}
    found += [adaln_job(op, 4, 256, 1152, torch.float32, way, goals[way], **fp32) for op in ADALN for way in both]
    return found + [history_job(1, L=L, **fp32) for L in (256, 64, 16)]
