"""A shape of an op, its inputs, and what ours and plain PyTorch make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

import ard_kernels
from ard_kernels import SegmentMask
from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.qk_norm_rope import reference as norm_rope_reference
from ard_kernels.segment_adaln import reference as adaln_reference
from testing import plain
from testing.plain import EPS as EPS
from testing.plain import TAKES

MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "M2+sink": (2, 1)}
# Masks of segment_attention, by the number of segments.
SEGMENT_MASKS: dict[str, Callable[[int], SegmentMask]] = {
    "block-causal": SegmentMask.block_causal,
    "block-causal, window 4": partial(SegmentMask.block_causal, window=4),
    "teacher-forcing": lambda segments: SegmentMask.teacher_forcing(segments // 2),  # the clean and the noisy ones
}
ADALN = tuple(TAKES)
# Seams of a video model with a row per frame, (B, S, 1, C), after Wan: what gate_residual_adaln takes beside x and
# branch.
SEAMS = {
    "norm3": ("gate", "weight", "bias"),  # before cross attention: a LayerNorm with parameters, without modulation
    "no gate": ("shift", "scale"),  # after cross attention
    "frames": ("gate", "shift", "scale"),  # the next block's first norm
}
SEGMENT = "segment_attention"
NORM_ROPE = "qk_norm_rope"
PACKED = "block_causal_attention_packed"  # one qkv projection in, one gradient out
ATTENTION = ("block_causal_attention", PACKED, "history_attention")
OPS = (*ATTENTION, *ADALN, NORM_ROPE)
BACKENDS = ("triton", "cuda")  # the kernels of ours that run on a GPU; the riskier ones last


@dataclass(frozen=True)
class Case:
    """One shape of one op. Attention uses H and D, the adaLN family C; rows (shift, scale, gate) have `row_dtype`.

    `mask` names one of MASKS, of segment_attention one of SEGMENT_MASKS; `kv_heads` of segment_attention, None for H;
    `scale` of block_causal_attention, None for the default; `seam`: gate_residual_adaln as one of SEAMS; `norm` of the
    adaLN family. qk_norm_rope: RMSNorm with weights `over` a head or all, then interleaved pairs turned.
    """

    op: str
    B: int
    lengths: tuple[int, ...]
    H: int = 16
    D: int = 72
    C: int = 1152
    dtype: torch.dtype = torch.bfloat16
    row_dtype: torch.dtype = torch.float32
    mask: str = "M4"
    packed: bool = True
    per_token: bool = False
    scale: float | None = None
    kv_heads: int | None = None
    seam: str | None = None
    over: str = "head"
    norm: str = "layer"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def width(self) -> int:
        if self.op == NORM_ROPE:
            return self.H * self.D
        return self.C if self.op in ADALN else self.D

    @property
    def registered_op(self) -> str:
        """The op in the tables of ard_kernels.common.backends and ard_kernels.common.tuning."""
        return "block_causal_attention" if self.op == PACKED else self.op

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.H

    @property
    def takes(self) -> tuple[str, ...]:
        """Of the adaLN family: names of the inputs."""
        return TAKES[self.op] if self.seam is None else ("x", "branch", *SEAMS[self.seam])

    @cached_property
    def segment_mask(self) -> SegmentMask:
        """Attention's mask."""
        count = len(self.lengths)
        if self.op == SEGMENT:
            return SEGMENT_MASKS[self.mask](count)
        window, sink = MASKS[self.mask]
        return SegmentMask.block_causal(count, None if window is None else min(window, count), min(sink, count))

    @property
    def segments(self) -> Segments:
        """Attention's mask and lengths."""
        return Segments(self.segment_mask.code, self.lengths, self.lengths)

    @property
    def segment_length(self) -> int | list[int]:
        return self.lengths[0] if len(set(self.lengths)) == 1 else list(self.lengths)

    @property
    def label(self) -> str:
        equal = isinstance(self.segment_length, int)
        tokens = f"S{len(self.lengths)} L{self.lengths[0]}" if equal else f"lengths {list(self.lengths)}"
        if self.op in ADALN:
            rows = "per token" if self.per_token else "rows"
            seam = f" {self.seam}" if self.seam else " RMSNorm" if self.norm == "rms" else ""
            return f"{self.op}{seam} B{self.B} {tokens} C{self.C} {name(self.dtype)}, {rows} {name(self.row_dtype)}"
        if self.op == NORM_ROPE:
            return f"{self.op} B{self.B} H{self.H} T{self.tokens} D{self.D} {name(self.dtype)} over {self.over}"
        layout = "one qkv" if self.op == PACKED else "packed" if self.packed else "contiguous"
        rest = f" scale {self.scale}" * (self.scale is not None)
        heads = f"H{self.H}" + f":{self.kv_heads}" * (self.kv_heads is not None)
        return f"{self.op} B{self.B} {heads} {tokens} D{self.D} {name(self.dtype)} {self.mask} {layout}{rest}"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def facts(case: Case, backend: str) -> dict:
    """What a result says of the case it is for."""
    said = {"case": case.label, "op": case.registered_op, "dtype": name(case.dtype), "width": case.width}
    return said | {"backend": backend}


def attention_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q (B, H, T, D), k, v (B, key heads, T, D) leaves: views of one projection, or contiguous; or that projection."""
    heads = [case.H, case.key_heads, case.key_heads]
    if case.packed or case.op == PACKED:
        projection = torch.randn(case.B, case.tokens, sum(heads), case.D, device=device).to(case.dtype)
        if case.op == PACKED:
            return [projection.unflatten(2, (3, case.H)).requires_grad_()]
        parts = [x.transpose(1, 2) for x in projection.split(heads, 2)]
    else:
        parts = [torch.randn(case.B, count, case.tokens, case.D, device=device).to(case.dtype) for count in heads]
    return [x.detach().requires_grad_() for x in parts]


def adaln_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """Of x, branch (B, T, C), gate, shift, scale, chunks of one (B, S or T, 6C), of a seam of one (B, S, 6, C), and
    weight, bias (C,) those the case takes; leaves."""
    x, branch = (torch.randn(case.B, case.tokens, case.C, device=device).to(case.dtype) for _ in range(2))
    count = case.tokens if case.per_token else len(case.lengths)
    rows = torch.randn(case.B, count, 6 * case.C, device=device).to(case.row_dtype)
    gate, shift, scale = (rows.unflatten(2, (6, -1)) if case.seam else rows).chunk(6, 2)[1:4]
    weight, bias = torch.randn(2, case.C, device=device).unbind()
    named = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
    return [named[argument].detach().requires_grad_() for argument in case.takes]


def norm_rope_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k (B, T, H, D), views of one packed projection, and their weights; leaves."""
    qkv = torch.randn(case.B, case.tokens, 3, case.H, case.D, device=device).to(case.dtype)
    width = case.H * case.D if case.over == "all" else case.D
    weights = [1 + torch.randn(width, device=device) / 4 for _ in range(2)]
    return [x.detach().requires_grad_() for x in (*qkv.unbind(2)[:2], *weights)]


def rotary_tables(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (T, D / 2)."""
    frequency = 10000.0 ** -(torch.arange(0, case.D, 2, device=device) / case.D)
    angles = torch.arange(case.tokens, device=device)[:, None] * frequency
    return angles.cos(), angles.sin()


def run_norm_rope(case: Case, inputs, tables, backend: str | None) -> tuple[torch.Tensor, ...]:
    q, k, q_weight, k_weight = inputs
    how = {"over": case.over, "q_weight": q_weight, "k_weight": k_weight, "layout": "bthd", "backend": backend}
    return ard_kernels.qk_norm_rope(q, k, *tables, **how)


def heads_first(case: Case, tensors) -> list[torch.Tensor]:
    """q, k, v or their gradients as three (B, H, T, D), also those of the packed op."""
    return [x.transpose(1, 2) for x in tensors[0].unbind(2)] if case.op == PACKED else list(tensors)


def make_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    if case.op == NORM_ROPE:
        return norm_rope_inputs(case, device)
    return (adaln_inputs if case.op in ADALN else attention_inputs)(case, device)


def run_ours(case: Case, inputs, backend: str | None) -> tuple[torch.Tensor, ...]:
    """The op's outputs, of attention (B, H, T, D); history attention appends its segments and gives them joined."""
    if case.op == "history_attention":
        return (run_history(case, inputs, backend),)
    if case.op == NORM_ROPE:
        return run_norm_rope(case, inputs, rotary_tables(case, inputs[0].device), backend)
    settings = {"segment_length": case.segment_length, "backend": backend}
    if case.op == SEGMENT:
        settings["mask"] = case.segment_mask
    elif case.op in ATTENTION:
        settings |= dict(zip(("window", "sink"), MASKS[case.mask], strict=True)) | {"scale": case.scale}
    if case.norm != "layer":
        settings["norm"] = case.norm
    if case.op in ADALN:
        outputs = getattr(ard_kernels, case.op)(**dict(zip(case.takes, inputs, strict=True)), **settings)
    else:
        outputs = getattr(ard_kernels, case.op)(*inputs, **settings)
    if case.op == PACKED:
        outputs = outputs.transpose(1, 2)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def new_cache(case: Case, device: torch.device) -> ard_kernels.HistoryCache:
    cache = ard_kernels.HistoryCache(1, case.B, case.H, case.D, case.tokens, case.dtype, device)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def run_history(case: Case, inputs, backend: str | None, cache=None) -> torch.Tensor:
    cache = cache or new_cache(case, inputs[0].device)
    cache.reset()
    window, sink = MASKS[case.mask]
    outputs, start = [], 0
    with torch.no_grad():
        for length in case.lengths:
            q, k, v = (x[:, :, start : start + length] for x in inputs)
            settings = {"layer": 0, "window": window, "sink": sink, "backend": backend}
            outputs.append(ard_kernels.history_attention(q, k, v, cache, **settings))
            start += length
    return torch.cat(outputs, 2)


def plain_attention(case: Case, q, k, v) -> torch.Tensor:
    """Plain PyTorch in the inputs' dtype; history attention's steps joined."""
    return plain.block_causal_attention(q, k, v, case.lengths, *MASKS[case.mask], case.scale)


def plain_adaln(case: Case, *inputs) -> tuple[torch.Tensor, ...]:
    named = dict(zip(case.takes, inputs, strict=True))
    parameters = {name: named.get(name) for name in ("weight", "bias")}
    rows = [named.get(name) for name in TAKES[case.op]]
    return plain.adaln(case.op, *rows, lengths=[1] if case.per_token else case.lengths, norm=case.norm, **parameters)


def exact_adaln(case: Case, *inputs) -> tuple[torch.Tensor, ...]:
    """`plain_adaln` in fp64."""
    named = dict(zip(case.takes, inputs, strict=True))
    parameters = {name: named[name] for name in ("weight", "bias") if name in named}
    parameters |= {} if case.norm == "layer" else {"norm": case.norm}
    rows, lengths = [named.get(name) for name in TAKES[case.op]], [1] if case.per_token else list(case.lengths)
    outputs = getattr(adaln_reference, case.op)(*rows, lengths, **parameters)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def plain_norm_rope(case: Case, *inputs) -> tuple[torch.Tensor, ...]:
    """q and k, in plain PyTorch in their dtype."""
    tables = [table[None, :, None] for table in rotary_tables(case, inputs[0].device)]
    pairs = zip(inputs[:2], inputs[2:], strict=True)
    return tuple(plain.rotate(plain.qk_norm(x, "rms", case.over, weight), *tables) for x, weight in pairs)


def exact_norm_rope(case: Case, *inputs) -> tuple[torch.Tensor, ...]:
    """q and k, of inputs in fp64."""
    tables = [table[None, :, None] for table in rotary_tables(case, inputs[0].device)]
    return tuple(
        norm_rope_reference.rotate(norm_rope_reference.norm(x, "rms", case.over == "all", weight), *tables, False)
        for x, weight in zip(inputs[:2], inputs[2:], strict=True)
    )


def tiny_case(op: str, D: int = 64) -> Case:
    """What a dry run can afford in the interpreter and the emulator."""
    return Case(op, 1, (16, 16), H=1, D=D, C=24)
