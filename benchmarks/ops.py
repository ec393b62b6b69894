"""The registry of ops: how each is run, its peers, its useful work; and the comparisons that are made of them.

Targets: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ard_kernels import history_attention
from ard_kernels.block_causal_attention.spec import visibility
from ard_kernels.common.backends import refusal, resolve
from benchmarks.block_causal_attention.peers import attention_peers
from benchmarks.exact import Exact, exact_adaln, exact_attention, exact_norm_rope
from benchmarks.history_attention.peers import history_peers, segments
from benchmarks.qk_norm_rope.peers import norm_rope_peers
from benchmarks.segment_adaln.peers import adaln_peers
from benchmarks.timing import TINY
from testing import cases
from testing.cases import ADALN, BACKENDS, MASKS, NORM_ROPE, PACKED, SEAMS, SEGMENT, Case

Makers = dict[str, Callable[[], Callable]]  # what makes a candidate, by its name
PASSES = {"forward": (0,), "backward": (1,), "forward+backward": (0, 1)}
# Tensors (B, T, C) that any kernel must read or write, and FLOPs per element of one: forward, backward.
ADALN_WORK = {
    "adaln_modulate": ((2, 3), (8, 15)),
    "gate_residual_adaln": ((4, 6), (10, 19)),
    "gate_residual": ((3, 3), (2, 4)),
    # Seams; without a gate the gradients of x and branch are one tensor.
    "norm3": ((4, 6), (10, 19)),
    "no gate": ((4, 4), (9, 16)),
    "frames": ((4, 6), (10, 19)),
}


def attention_work(case: Case, direction: str) -> tuple[int, int]:
    """2 matmuls forward, 5 backward, of the pairs that the mask keeps; q, k, v, out and their gradients moved once."""
    matmuls, times = (sum(counts[i] for i in PASSES[direction]) for counts in ((2, 5), (1, 2)))
    pairs = visibility(case.segments, case.tokens, case.tokens).pairs
    moved = 2 * (case.H + case.key_heads) * case.B * case.tokens * case.D
    return matmuls * 2 * case.B * case.H * case.D * pairs, times * moved * case.dtype.itemsize


def history_work(case: Case, direction: str) -> tuple[int, int]:
    """All steps of one layer: q and out; k, v in and appended; the keys and values that each step reads."""
    read = sum(sum(case.lengths[: step + 1]) for step in range(len(case.lengths)))
    nbytes = 2 * case.B * case.H * case.D * (case.tokens * 3 + read) * case.dtype.itemsize
    return attention_work(case, direction)[0], nbytes


def adaln_work(case: Case, direction: str) -> tuple[int, int]:
    tensors, flops = (sum(counts[i] for i in PASSES[direction]) for counts in ADALN_WORK[case.seam or case.op])
    elements = case.B * case.tokens * case.C
    return flops * elements, tensors * elements * case.dtype.itemsize


def norm_rope_work(case: Case, direction: str) -> tuple[int, int]:
    """Of q and k: x and y forward; dy, x and dx backward."""
    tensors, flops = (sum(counts[i] for i in PASSES[direction]) for counts in ((2, 3), (9, 18)))
    elements = 2 * case.B * case.tokens * case.width
    return flops * elements, tensors * elements * case.dtype.itemsize


def run_norm_rope(case: Case, device: torch.device, backend: str) -> Callable:
    tables = cases.rotary_tables(case, device)
    return lambda *inputs: cases.run_norm_rope(case, inputs, tables, backend)


def packed_peers(case: Case, device: torch.device, compiled: bool) -> Makers:
    def on_packed(attend: Callable) -> Callable:
        return lambda qkv: attend(*cases.heads_first(case, [qkv]))

    peers = attention_peers(case, device, compiled)
    return {name: lambda make=make: on_packed(make()) for name, make in peers.items()}


def run_op(case: Case, device: torch.device, backend: str) -> Callable:
    return lambda *inputs: cases.run_ours(case, inputs, backend)


def run_history(case: Case, device: torch.device, backend: str) -> Callable:
    """All steps, each with its output: joining them is no work of the op's."""
    cache = cases.new_cache(case, device)
    window, sink = MASKS[case.mask]
    settings = {"layer": 0, "window": window, "sink": sink, "backend": backend}

    def run(q, k, v):
        cache.reset()
        return tuple(history_attention(*own, cache, **settings) for _, own in segments(case, q, k, v))

    return run


class Op(NamedTuple):
    """How an op is measured.

    unit: of its rate, which is bound by matmuls (TFLOP/s) or by memory (GB/s). work: (useful FLOPs, bytes that any
    kernel must move) of a case in a direction. exact: what candidates are checked against. outputs: how many it has.
    """

    unit: str
    ours: Callable[[Case, torch.device, str], Callable]
    peers: Callable[[Case, torch.device, bool], Makers]
    work: Callable[[Case, str], tuple[int, int]]
    exact: Callable[[Case, Sequence[torch.Tensor], Sequence[torch.Tensor] | None], Exact]
    outputs: int = 1


OPS = {
    "block_causal_attention": Op("TFLOP/s", run_op, attention_peers, attention_work, exact_attention),
    PACKED: Op("TFLOP/s", run_op, packed_peers, attention_work, exact_attention),
    SEGMENT: Op("TFLOP/s", run_op, attention_peers, attention_work, exact_attention),
    "history_attention": Op("TFLOP/s", run_history, history_peers, history_work, exact_attention),
    NORM_ROPE: Op("GB/s", run_norm_rope, norm_rope_peers, norm_rope_work, exact_norm_rope, outputs=2),
    "adaln_modulate": Op("GB/s", run_op, adaln_peers, adaln_work, exact_adaln),
    "gate_residual_adaln": Op("GB/s", run_op, adaln_peers, adaln_work, exact_adaln, outputs=2),
    "gate_residual": Op("GB/s", run_op, adaln_peers, adaln_work, exact_adaln),
}


@dataclass(frozen=True)
class Job:
    """One comparison: a row for each of our backends. `target`: the least ratio of the fastest peer's time to ours.

    rate_target: TFLOP/s of useful work. fraction_target: of the measured copy bandwidth. fresh_memory: what a call
    allocates has no pages yet, as with a malloc that keeps nothing, and in glibc's any block of 32 MB and more.
    """

    case: Case
    direction: str  # forward, backward, forward+backward
    target: float
    rate_target: float | None = None
    fraction_target: float | None = None
    fresh_memory: bool = False

    @property
    def op(self) -> Op:
        return OPS[self.case.op]

    @property
    def shape(self) -> str:
        return self.case.label + (", fresh memory" if self.fresh_memory else "")

    @property
    def label(self) -> str:
        return f"{self.shape} {self.direction}"

    @property
    def intensity(self) -> float:
        """Useful FLOPs per byte that any kernel must move."""
        flops, nbytes = self.op.work(self.case, self.direction)
        return flops / nbytes

    def rate(self, milliseconds: float) -> float:
        """Useful work per time, in the op's unit."""
        flops, nbytes = self.op.work(self.case, self.direction)
        return flops / milliseconds / 1e9 if self.op.unit == "TFLOP/s" else nbytes / milliseconds / 1e6


def our_backends(case: Case, device: torch.device) -> list[str]:
    """On a GPU all that serve, flash too; on the CPU what the library runs by itself, or what it chooses from."""
    if device.type == "cpu" and not TINY:
        if case.dtype == torch.bfloat16:
            return ["cpu", "torch"]
        return [resolve(case.registered_op, None, device, case.dtype, case.width)]
    return [b for b in (*BACKENDS, "flash") if refusal(case.registered_op, b, device, case.dtype, case.width) is None]


def attention_job(
    B, L, D, mask, direction, target, rate_target=None, S=4, H=16, op="block_causal_attention", dtype=torch.bfloat16
) -> Job:
    return Job(Case(op, B, (L,) * S, H=H, D=D, mask=mask, dtype=dtype), direction, target, rate_target)


def segment_job(lengths, mask, direction, target, rate_target=None, B=1, dtype=torch.bfloat16, **heads) -> Job:
    """heads: H, kv_heads and D."""
    return Job(Case(SEGMENT, B, lengths, mask=mask, dtype=dtype, **heads), direction, target, rate_target)


def adaln_job(
    op, B, L, C, row_dtype, direction, target=None, fraction_target=None, S=4, dtype=torch.bfloat16, norm="layer"
) -> Job:
    if target is None:  # the GPU's
        target, fraction_target = (1.2, 0.90) if direction == "forward" else (1.5, 0.75)
    case = Case(op, B, (L,) * S, C=C, dtype=dtype, row_dtype=row_dtype, norm=norm)
    return Job(case, direction, target, fraction_target=fraction_target)


def seam_job(seam, L, C, direction, target, fraction_target=None, dtype=torch.bfloat16, S=3) -> Job:
    """A chunk of S frames of L tokens of a causal video model."""
    case = Case("gate_residual_adaln", 1, (L,) * S, C=C, dtype=dtype, seam=seam)
    return Job(case, direction, target, fraction_target=fraction_target)


def history_job(B, D=72, L=256, S=4, H=16, dtype=torch.bfloat16) -> Job:
    return Job(Case("history_attention", B, (L,) * S, H=H, D=D, dtype=dtype), "forward", 1.0)


# Wan 2.1's q and k over all heads, of a frame at 480p; LightningDiT's and Flux's per head: B, T, H, D, over.
NORM_ROPE_SHAPES = (
    (1, 1560, 12, 128, "all"),
    (4, 256, 16, 72, "head"),
    (4, 1024, 16, 72, "head"),
    (4, 1024, 16, 128, "head"),
)


def norm_rope_job(B, T, H, D, over, direction, target, dtype=torch.bfloat16) -> Job:
    return Job(Case(NORM_ROPE, B, (T,), H=H, D=D, over=over, dtype=dtype), direction, target)


class Stream(NamedTuple):
    """Attention of a model that others train: masks, heads and lengths; small: lengths and heads a CPU can afford."""

    masks: tuple[str, ...]
    lengths: tuple[int, ...]
    heads: dict[str, int]
    small: tuple[tuple[int, ...], dict[str, int]]
    B: int = 1


BOTH = ("block-causal", "teacher-forcing")
STREAMS = (
    Stream(BOTH, (4680,) * 7, {"H": 12, "D": 128}, ((234,) * 7, {"H": 4, "D": 128})),  # Wan-1.3B, chunks of 3 frames
    Stream(BOTH, (7040,) * 4, {"H": 24, "D": 128}, ((352,) * 4, {"H": 4, "D": 128})),  # LongLive 2, chunks of 8 frames
    Stream(  # like MAGI-1: grouped heads, a window of 4 chunks
        ("block-causal, window 4",), (4680,) * 8, {"H": 48, "kv_heads": 8, "D": 128},
        ((234,) * 8, {"H": 6, "kv_heads": 1, "D": 128}),
    ),
    Stream(  # like pi0: images and text, state, actions; one head of keys
        ("block-causal",), (816, 1, 207), {"H": 8, "kv_heads": 1, "D": 256},
        ((204, 1, 51), {"H": 8, "kv_heads": 1, "D": 256}), B=8,
    ),
)  # fmt: skip


def stream_jobs(ways: dict[str, tuple], small: bool, dtype: torch.dtype) -> list[Job]:
    """ways: (ratio, rate) to reach by direction; a rate is asked of the long ones."""
    found = []
    for stream in STREAMS:
        lengths, heads = stream.small if small else (stream.lengths, stream.heads)
        for mask in stream.masks:
            lengths_here = lengths * 2 if mask == "teacher-forcing" else lengths
            for way, (target, rate) in ways.items():
                rate = rate if min(lengths) >= 1024 else None
                found.append(segment_job(lengths_here, mask, way, target, rate, stream.B, dtype, **heads))
    return found


def tiny_jobs() -> list[Job]:
    ways = ("forward", "backward")
    found = [attention_job(1, 16, 64, "M4", way, 1.3, S=2, H=1) for way in ways]
    found += [adaln_job(op, 1, 16, 24, torch.float32, way, S=2) for op in ADALN[:2] for way in ways]
    found += [adaln_job(ADALN[1], 1, 16, 24, torch.float32, "backward", S=2, norm="rms")]
    found += [attention_job(1, 16, 64, "M3", "backward", 1.3, S=2, H=1, op=PACKED)]
    found += [seam_job(seam, 16, 24, "backward", 1.0, S=2) for seam in SEAMS]
    found += [norm_rope_job(1, 4, 2, 16, "all", way, 1.0) for way in ways]
    found += [segment_job((16,) * 4, "teacher-forcing", way, 1.0, H=2, kv_heads=1, D=64) for way in ways]
    return [*found, history_job(1, 64, L=16, S=2, H=1)]


def gpu_jobs() -> list[Job]:
    """The model's own shapes first."""
    ways = ("forward", "backward")
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
    long = ((8, 1024), (2, 4096))
    found += [attention_job(B, L, D, "M4", way, 1.0) for B, L in long for D in (64, 128) for way in ways]
    dtypes = (torch.float32, torch.bfloat16)
    found += [adaln_job("gate_residual", 32, 256, 1152, dtype, way) for dtype in dtypes for way in ways]
    found += [norm_rope_job(8 * B, *shape, way, 1.2) for B, *shape in NORM_ROPE_SHAPES for way in ways]
    found += stream_jobs({"forward": (1.1, 500.0), "backward": (1.1, 350.0)}, False, torch.bfloat16)
    goals = {"forward": (1.2, 0.90), "backward": (1.5, 0.75)}
    found += [seam_job(seam, 1560, C, way, *goals[way]) for C in (1536, 5120) for seam in SEAMS for way in ways]
    # Shape classes of their own, for the automatic choice.
    found += [history_job(B, D) for D in (64, 128) for B in (1, 32)]
    found += [attention_job(32, 256, 96, "M4", way, 1.0) for way in ways]
    found += [history_job(B, 96) for B in (1, 32)]
    found += [adaln_job(op, 32, 256, C, torch.float32, way) for C in (384, 4096) for op in ADALN for way in ways]
    found += [adaln_job(op, 32, 256, 1152, torch.float32, way, norm="rms") for op in ADALN[:2] for way in ways]
    return found


def cpu_jobs() -> list[Job]:
    """fp32 but for some attention in bf16, of which both backends are timed: `measured_slower` follows from it."""
    fp32, both = {"dtype": torch.float32}, ("forward", "forward+backward")
    # B, H, L, D and the goals of both directions; B 64 is a batch of the demo's.
    shapes = [
        ((1, 16, 256, 72), (1.15, 1.3)), ((1, 16, 64, 72), (1.5, 1.5)), ((1, 16, 16, 72), (1.5, 1.5)),
        ((16, 16, 16, 72), (1.0, 1.0)), ((1, 16, 4, 72), (1.5, 1.5)), ((64, 4, 16, 16), (1.5, 1.5)),
        ((64, 4, 4, 16), (1.5, 1.5)), ((1, 16, 256, 64), (1.0, 1.0)), ((1, 16, 256, 128), (1.0, 1.0)),
        ((1, 4, 1024, 72), (1.0, 1.0)),
    ]  # fmt: skip
    found = [
        attention_job(B, L, D, "M4", way, goal, H=H, **fp32)
        for (B, H, L, D), goals in shapes
        for way, goal in zip(both, goals, strict=True)
    ]
    goals = {"forward": 1.15, "forward+backward": 1.3}
    found += [attention_job(1, 256, 72, "M4", way, goals[way], op=PACKED, **fp32) for way in both]
    found += [attention_job(1, 256, 72, mask, "forward", 1.0, **fp32) for mask in ("M1", "M3")]
    found += [attention_job(1, L, 72, "M4", way, 1.0) for L in (256, 64, 16) for way in both]
    found += stream_jobs({way: (1.0, None) for way in both}, True, torch.float32)
    goals = {"forward": 1.5, "forward+backward": 2.0}
    found += [adaln_job(op, 4, 256, 1152, torch.float32, way, goals[way], **fp32) for op in ADALN for way in both]
    fresh = (adaln_job(op, 4, 256, 1152, torch.float32, way, 1.0, **fp32) for op in ADALN[:2] for way in both)
    found += [replace(job, fresh_memory=True) for job in fresh]
    found += [seam_job(seam, 1560, 1536, "forward+backward", goals["forward+backward"], **fp32) for seam in SEAMS]
    goals = {"forward": 1.3, "forward+backward": 1.5}
    found += [norm_rope_job(*shape, way, goals[way], **fp32) for shape in NORM_ROPE_SHAPES for way in both]
    return found + [history_job(1, L=L, **fp32) for L in (256, 64, 16)]


def jobs(device: torch.device) -> list[Job]:
    return tiny_jobs() if TINY else gpu_jobs() if device.type == "cuda" else cpu_jobs()
