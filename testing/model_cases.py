"""The cases of tests/test_model_sizes.py: what DiT-XL/2 runs and its widths on a GPU, tiny ones on the CPU.

Most important first; those marked slow go through every size, width, dtype, mask and layout.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ard_kernels.block_causal_attention import cuda
from testing.cases import ADALN, ATTENTION, BACKENDS, MASKS, NORM_ROPE, OPS, PACKED, Case, tiny_case
from testing.devices import DEVICES, on_devices

# The first of each is the model's.
HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (72, *(D for D in cuda.HEAD_DIMS if D != 72))
CHANNELS = (1152, 384, 1024, 72, 4096, 8192)
HUGE = 8192  # tokens from which a case takes long, most of it in the reference
MODEL = (256,) * 4
RAGGED = [(7, 300, 64, 1), (256, 192, 256), (33,), (1000, 24, 511)]


def takes(backend: str, case: Case) -> bool:
    """Whether `backend` has kernels for this dtype and width on some GPU."""
    if backend != "cuda":
        return True
    if case.op == NORM_ROPE:
        return True
    if case.op in ADALN:
        return case.C % 8 == 0 and CHANNELS[-1] >= case.C
    return case.dtype in HALVES and case.D in HEAD_DIMS


def parameters(cases_of: Callable[[str], list[tuple[Case, bool]]]) -> list:
    """(backend, device, case) of each (case, slow) that `cases_of` has for a device; a case's backends in a row."""
    return [
        pytest.param(
            backend,
            device,
            case,
            id=f"{backend}-on-{device}-{case.label.replace(' ', '_')}",
            marks=[*marks.marks, *([pytest.mark.slow] if slow else [])],
        )
        for where in DEVICES
        for case, slow in cases_of(where)
        for marks in on_devices("cpu", *BACKENDS)
        for backend, device in (marks.values,)
        if device == where and takes(backend, case)
    ]


def values(device: str) -> list[tuple[Case, bool]]:
    """Cases whose outputs and gradients are compared with fp64."""
    if device == "cpu":
        return [(case, False) for case in _tiny()]
    few = dict.fromkeys(_few())
    return [(case, False) for case in few] + [(case, True) for case in dict.fromkeys(_many()) if case not in few]


def model_layer(batch: int) -> Callable[[str], list[tuple[Case, bool]]]:
    """One case of each op, the model's on a GPU."""
    return lambda device: [(tiny_case(op) if device == "cpu" else Case(op, batch, MODEL), False) for op in OPS]


def _tiny() -> list[Case]:
    attention, history = tiny_case(ATTENTION[0]), tiny_case(ATTENTION[2])
    ragged = Case(ATTENTION[0], 1, (5, 20, 7), H=1, D=72, mask="M3", packed=False)
    cases = [*map(tiny_case, OPS), replace(attention, scale=-0.1), ragged]
    return [*cases, replace(history, dtype=torch.float32)]


def _few() -> list[Case]:
    """What DiT-XL/2 runs, each mask, each width once."""
    attention, history = ATTENTION[0], ATTENTION[2]
    few = [Case(op, 4, MODEL) for op in (*ATTENTION, *ADALN)] + [Case(attention, 4, MODEL, mask=mask) for mask in MASKS]
    few += [Case(history, 1, MODEL)]  # keys are split
    few += [Case(op, 4, MODEL, row_dtype=torch.bfloat16) for op in ADALN]
    # On Hopper, kernels for older chips run what its own do not take: a negative scale.
    few += [Case(attention, 4, MODEL, D=D, scale=-0.1) for D in HEAD_DIMS]
    few += [Case(op, 1, (64,) * 4, H=4, dtype=torch.float32) for op in (*ATTENTION, *ADALN)]
    heads = [(16, 64, "head"), (16, 72, "head"), (12, 128, "all"), (40, 128, "all")]
    few += [Case(NORM_ROPE, 2, MODEL, H=H, D=D, over=over) for H, D, over in heads]
    # Ever more shared memory asked of the same kernels, in one process.
    few += [Case(op, 1, (64,) * 2, C=C, dtype=torch.float32) for C in (2048, 3072, 4096, 8192) for op in ADALN]
    few += [Case(op, 4, MODEL, D=D) for D in HEAD_DIMS for op in ATTENTION]
    return few + [Case(op, 4, MODEL, C=C) for C in CHANNELS for op in ADALN]


def _many() -> list[Case]:
    """Everything, in a fixed order; those alike in what is compiled for them follow one another."""
    sizes = [(4, 4, 256), (1, 4, 64), (2, 8, 256), (64, 4, 256), (8, 1, 256), (1, 4, 1024), (1, 8, 4096), (2, 3, 192)]
    many = [
        Case(op, B, (L,) * S, D=D, dtype=dtype, mask=mask, packed=packed)
        for op, (B, S, L), D, dtype, mask, packed in itertools.product(
            ATTENTION, sizes, HEAD_DIMS, HALVES, MASKS, (True, False)
        )
        if packed or op != PACKED
    ]
    sizes = [(4, 4, 256), (64, 4, 256), (1, 8, 64), (1, 4, 4096)]
    many += [
        Case(op, B, (L,) * S, C=C, dtype=dtype, row_dtype=row_dtype, per_token=per_token)
        for op, (B, S, L), C, dtype, row_dtype, per_token in itertools.product(
            ADALN, sizes, CHANNELS, HALVES, (torch.float32, torch.bfloat16), (False, True)
        )
    ]
    ops = (*ATTENTION, *ADALN)
    many += [
        Case(op, 2, lengths, D=D, mask=mask) for lengths in RAGGED for op in ops for D in (72, 128) for mask in MASKS
    ]
    random.Random(0).shuffle(many)
    return sorted(many, key=_rank)


def _rank(case: Case) -> tuple[bool, int, int]:
    width = CHANNELS.index(case.C) if case.op in ADALN else HEAD_DIMS.index(case.D)
    return case.tokens > HUGE, width, HALVES.index(case.dtype)
