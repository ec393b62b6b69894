"""The shapes that the correctness stage walks through, and which of our backends serve them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import torch

from ard_kernels.common.backends import refusal
from benchmarks.gpu.record import MOST_CRASHES, Record
from testing.cases import ADALN, ATTENTION, BACKENDS, MASKS, OPS, PACKED, Case, tiny_case

# The first of each is the model's.
HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (72, 64, 128, 80, 96)
CHANNELS = (1152, 384, 1024, 72, 4096, 8192)
HUGE = 8192  # tokens from which a case takes long, most of it in the reference


def serving(record: Record, case: Case) -> list[str]:
    """Our GPU backends that run this case; why each other one does not is counted in the stage's results."""
    found = []
    for backend in BACKENDS:
        reason = refusal(case.registered_op, backend, record.device, case.dtype, case.width)
        known = f"{case.label} on {backend}" in record.crashed  # it is not run again, and its row says so
        if reason is None and not known and record.given_up(case.registered_op, backend):
            reason = f"{case.registered_op} is not run any more: it has ended {MOST_CRASHES} processes"
        if reason is None:
            found.append(backend)
        else:
            counts = record.facts.setdefault("not_served", {})
            counts[f"{backend}: {reason}"] = counts.get(f"{backend}: {reason}", 0) + 1
    return found


def rank(case: Case) -> tuple[bool, int, int]:
    """What to run first. Cases alike in it share compiled kernels, and compiling takes most of the time."""
    width = CHANNELS.index(case.C) if case.op in ADALN else HEAD_DIMS.index(case.D)
    return case.tokens > HUGE, width, HALVES.index(case.dtype)


def correctness_cases(dry: bool) -> list[Case]:
    """What DiT-XL/2 runs, its widths at every size and mask, one case per width, then all; in a fixed order."""
    if dry:
        ragged = Case(OPS[0], 1, (5, 20, 7), H=1, D=72, mask="M3", packed=False)
        special = [replace(tiny_case(OPS[0]), scale=-0.1), replace(tiny_case("history_attention"), norm="rms")]
        # The last is not for every backend.
        return [*(tiny_case(op) for op in OPS), ragged, *special, tiny_case(OPS[0], D=16)]
    own = (256,) * 4
    first = [Case(op, 4, own) for op in OPS] + [Case(OPS[0], 4, own, mask=mask) for mask in MASKS]
    first += [Case("history_attention", 1, own, norm=norm) for norm in (None, "rms", "layer")]  # keys are split
    first += [Case(op, 4, own, row_dtype=torch.bfloat16) for op in ADALN]
    # On Hopper, kernels for older chips run what its own do not take: a negative scale.
    first += [Case(OPS[0], 4, own, D=D, scale=-0.1) for D in HEAD_DIMS]
    first += [Case(op, 1, (64,) * 4, H=4, dtype=torch.float32) for op in OPS]
    # Ever more shared memory asked of the same kernels, in one process.
    growing = [Case(op, 1, (64,) * 2, C=C, dtype=torch.float32) for C in (2048, 3072, 4096, 8192) for op in ADALN]
    spot = growing + [Case(op, 4, own, D=D) for D in HEAD_DIMS for op in ATTENTION]
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
