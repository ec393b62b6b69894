"""Inputs of every op, ours and plain PyTorch on them, and the list of shapes the correctness stage walks through."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ard_kernels
from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.segment_adaln.spec import row_of_token

MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "M2+sink": (2, 1)}
TAKES = {  # arguments of the adaLN family
    "adaln_modulate": ("x", "shift", "scale"),
    "gate_residual_adaln": ("x", "branch", "gate", "shift", "scale"),
    "gate_residual": ("x", "branch", "gate"),
}
ADALN = tuple(TAKES)
PACKED = "block_causal_attention_packed"  # one qkv projection in, one gradient out
ATTENTION = ("block_causal_attention", PACKED, "history_attention")
OPS = (*ATTENTION, *ADALN)
EPS = 1e-6
# The first of each is the model's.
HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (72, 64, 128, 80, 96)
CHANNELS = (1152, 384, 1024, 72, 4096, 8192)
HUGE = 8192  # tokens from which a case takes long, most of it in the reference


@dataclass(frozen=True)
class Case:
    """One shape of one op. Attention uses H and D, the adaLN family C; rows (shift, scale, gate) have `row_dtype`."""

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

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def segment_length(self) -> int | list[int]:
        return self.lengths[0] if len(set(self.lengths)) == 1 else list(self.lengths)

    @property
    def label(self) -> str:
        equal = isinstance(self.segment_length, int)
        tokens = f"S{len(self.lengths)} L{self.lengths[0]}" if equal else f"lengths {list(self.lengths)}"
        if self.op in ADALN:
            rows = "per token" if self.per_token else "rows"
            return f"{self.op} B{self.B} {tokens} C{self.C} {name(self.dtype)}, {rows} {name(self.row_dtype)}"
        layout = "one qkv" if self.op == PACKED else "packed" if self.packed else "contiguous"
        return f"{self.op} B{self.B} H{self.H} {tokens} D{self.D} {name(self.dtype)} {self.mask} {layout}"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backends_to_check(op: str, device: torch.device) -> list[str]:
    """The backends of this device that are kernels of ours; the torch composition where there is none."""
    table = ard_kernels.backends(device, torch.bfloat16)
    table = table["block_causal_attention" if op == PACKED else op]
    ours = [backend for backend, status in table.items() if status.available and backend not in ("torch", "cpu")]
    return ours or ["torch"]


def attention_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k, v (B, H, T, D) leaves: views of one (B, T, 3, H, D) projection, or contiguous; or that projection."""
    if case.packed or case.op == PACKED:
        packed = torch.randn(case.B, case.tokens, 3, case.H, case.D, device=device).to(case.dtype)
        if case.op == PACKED:
            return [packed.requires_grad_()]
        parts = [x.transpose(1, 2) for x in packed.unbind(2)]
    else:
        parts = [torch.randn(case.B, case.H, case.tokens, case.D, device=device).to(case.dtype) for _ in range(3)]
    return [x.detach().requires_grad_() for x in parts]


def adaln_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """Of x, branch (B, T, C) and gate, shift, scale, chunks of one (B, S or T, 6C), those the op takes; leaves."""
    x, branch = (torch.randn(case.B, case.tokens, case.C, device=device).to(case.dtype) for _ in range(2))
    count = case.tokens if case.per_token else len(case.lengths)
    rows = torch.randn(case.B, count, 6 * case.C, device=device).to(case.row_dtype)
    gate, shift, scale = rows.chunk(6, -1)[1:4]
    named = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    return [named[argument].detach().requires_grad_() for argument in TAKES[case.op]]


def heads_first(case: Case, tensors) -> list[torch.Tensor]:
    """q, k, v or their gradients as three (B, H, T, D), also those of the packed op."""
    return [x.transpose(1, 2) for x in tensors[0].unbind(2)] if case.op == PACKED else list(tensors)


def make_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    return (adaln_inputs if case.op in ADALN else attention_inputs)(case, device)


def run_ours(case: Case, inputs, backend: str | None) -> tuple[torch.Tensor, ...]:
    """The op's outputs, of attention (B, H, T, D); history attention appends its segments and gives them joined."""
    if case.op == "history_attention":
        return (run_history(case, inputs, backend),)
    settings = {"segment_length": case.segment_length, "backend": backend}
    if case.op in ATTENTION:
        settings |= dict(zip(("window", "sink"), MASKS[case.mask], strict=True))
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
    """Plain PyTorch in the inputs' dtype: softmax attention under a dense mask."""
    mask = dense_mask(list(case.lengths), case.tokens, *MASKS[case.mask], q.device)
    return (q @ k.transpose(-1, -2) * case.D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def plain_adaln(case: Case, *inputs) -> tuple[torch.Tensor, ...]:
    """The op as eager PyTorch code of a DiT writes it, rows spread over tokens."""
    named = dict(zip(TAKES[case.op], inputs, strict=True))
    token_rows = row_of_token([1] if case.per_token else case.lengths, case.tokens, inputs[0].device)
    x = h = named["x"]
    if "branch" in named:
        h = (x + named["gate"][:, token_rows] * named["branch"]).to(x.dtype)
    if "shift" not in named:
        return (h,)
    shift, scale = named["shift"][:, token_rows], named["scale"][:, token_rows]
    y = (F.layer_norm(h, (case.C,), eps=EPS) * (1 + scale) + shift).to(x.dtype)
    return (h, y) if "branch" in named else (y,)


def rank(case: Case) -> tuple[bool, int, int]:
    """What to run first. Cases alike in it share compiled kernels, and compiling takes most of the time."""
    width = CHANNELS.index(case.C) if case.op in ADALN else HEAD_DIMS.index(case.D)
    return case.tokens > HUGE, width, HALVES.index(case.dtype)


def correctness_cases(dry: bool) -> list[Case]:
    """What DiT-XL/2 runs, its widths at every size and mask, one case per width, then all; in a fixed order."""
    if dry:
        tiny = {"B": 1, "H": 1, "D": 16, "C": 24}
        cases = [Case(op, lengths=(16, 16), **tiny) for op in OPS]
        return [*cases, Case(OPS[0], lengths=(5, 20, 7), mask="M3", packed=False, **(tiny | {"D": 72}))]
    own = (256,) * 4
    first = [Case(op, 4, own) for op in OPS] + [Case(OPS[0], 4, own, mask=mask) for mask in MASKS]
    first += [Case(op, 4, own, row_dtype=torch.bfloat16) for op in ADALN]
    first += [Case(op, 1, (64,) * 4, H=4, dtype=torch.float32) for op in OPS]
    spot = [Case(op, 4, own, D=D) for D in HEAD_DIMS for op in ATTENTION]
    spot += [Case(op, 4, own, C=C) for C in CHANNELS for op in ADALN]
    rest = [
        Case(op, B, (L,) * S, D=D, dtype=dtype, mask=mask, packed=packed)
        for op, (B, S, L), D, dtype, mask, packed in itertools.product(
            ATTENTION,
            [(4, 4, 256), (1, 4, 64), (2, 8, 256), (64, 4, 256), (8, 1, 256), (1, 4, 1024), (1, 8, 4096), (2, 3, 192)],
            HEAD_DIMS,
            HALVES,
            MASKS,
            (True, False),
        )
        if packed or op != PACKED
    ]
    rest += [
        Case(op, B, (L,) * S, C=C, dtype=dtype, row_dtype=row_dtype, per_token=per_token)
        for op, (B, S, L), C, dtype, row_dtype, per_token in itertools.product(
            ADALN,
            [(4, 4, 256), (64, 4, 256), (1, 8, 64), (1, 4, 4096)],
            CHANNELS,
            HALVES,
            (torch.float32, torch.bfloat16),
            (False, True),
        )
    ]
    ragged = [(7, 300, 64, 1), (256, 192, 256), (33,), (1000, 24, 511)]
    rest += [
        Case(op, 2, lengths, D=D, mask=mask) for lengths in ragged for op in OPS for D in (72, 128) for mask in MASKS
    ]
    random.Random(0).shuffle(rest)
    rest.sort(key=rank)
    model = [case for case in rest if rank(case) == (False, 0, 0)]
    return list(dict.fromkeys(first + model + spot + rest))
