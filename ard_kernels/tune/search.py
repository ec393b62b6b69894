"""Which kernels calls launch, and the fastest constants of each: compiled, held against the default, timed in turns."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import CPU
from ard_kernels.common.tuning import Config
from ard_kernels.tune.calls import Call, without_launches
from ard_kernels.tune.timing import interleaved, make_timer


class Tuned(NamedTuple):
    """milliseconds: medians by configuration (as text). refused: why others were not timed."""

    default: Config
    winner: Config
    milliseconds: dict[str, float]
    refused: dict[str, str]

    @property
    def gain(self) -> float:
        """Time of the default over that of the winner."""
        return self.milliseconds[text_of(self.default)] / self.milliseconds[text_of(self.winner)]


def text_of(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def describe(error: BaseException) -> str:
    """Type, message and the place of an error, on one line."""
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(place[-1].filename).name}:{place[-1].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"


def relative(got: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over that of `expected`; 0 where both are the same, infinite where one has a NaN."""
    if torch.equal(got, expected):
        return 0.0
    off = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return math.inf if math.isnan(off) else off


def difference(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Why `got` is refused: further from `expected` than 4 eps of a tensor's dtype, or the coarser `dtype`; else ""."""
    for own, right in zip(got, expected, strict=True):
        off, limit = relative(own, right), 4 * max(torch.finfo(dtype).eps, torch.finfo(right.dtype).eps)
        if off > limit:
            return f"differs from the default by {off:.2e} of the 2-norm; expected at most {limit:.2e}"
    return ""


def plan(calls: Iterable[Call]) -> tuple[dict[str, Call], dict[Call, str]]:
    """For each table key that a call asks for, the call of most work; and why some calls cannot be tuned.

    Work is FLOPs, then bytes. Nothing is launched: no GPU is needed.
    """
    largest: dict[str, tuple[tuple[int, int], Call]] = {}
    refused = {}
    for call in calls:
        try:
            with without_launches(), tuning.override({}) as asked, FlopCounterMode(display=False) as counter:
                made = call.make(CPU, fill=False)
                call.run(made)
        except Exception as error:  # of whatever kind: a call of a dtype, an op or a size that is not served
            refused[call] = describe(error)
            continue
        nbytes = sum(x.nbytes for x in made.values() if isinstance(x, Tensor))
        work = counter.get_total_flops(), nbytes
        for key in asked:
            if key not in largest or largest[key][0] < work:
                largest[key] = work, call
    return {key: call for key, (_, call) in largest.items()}, refused


def tune_kernel(
    key: str, call: Call, candidates: Iterable[Config], device: torch.device, seconds: float, rounds: int = 20
) -> Tuned:
    """Time the default and those candidates of one kernel that compile and give the default's results.

    seconds: after so many no further candidate is tried, and no further round is timed.

    Raises:
        Exception: whatever the default raises.
    """
    default, begin = tuning.default(key, device), time.monotonic()
    made = call.make(device)

    def with_constants(config: Config) -> list[Tensor]:
        with tuning.override({key: config}):
            return call.run(made)

    expected = [x.clone() for x in with_constants(default)]
    configs, refused = {text_of(default): default}, {}
    for config in candidates:
        text = text_of(config)
        if text in configs or config.keys() != default.keys():
            continue
        if time.monotonic() - begin > seconds:
            refused[text] = f"not tried: {seconds:g} seconds were over"
            continue
        try:
            reason = difference(with_constants(config), expected, call.dtype)
        except Exception as error:  # OutOfResources, or the compiler gives up
            reason = describe(error)
        if reason:
            refused[text] = reason
        else:
            configs[text] = config
    left = max(1.0, seconds - (time.monotonic() - begin))
    runs = {text: partial(with_constants, config) for text, config in configs.items()}
    timings = interleaved(runs, rounds, min(3, rounds), timer=make_timer(device), seconds=min(3.0, left))
    milliseconds = {text: timing.median for text, timing in timings.items()}
    winner = configs[min(milliseconds, key=lambda text: milliseconds[text])]
    return Tuned(default, winner, milliseconds, refused)
