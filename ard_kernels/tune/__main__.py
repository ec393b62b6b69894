"""Find the fastest tile sizes of the Triton kernels for the shapes of your model, on the GPU at hand.

    ARD_RECORD_SHAPES=shapes.jsonl python your_program.py     a few steps suffice
    python -m ard_kernels.tune --shapes shapes.jsonl --dry-run
    python -m ard_kernels.tune --shapes shapes.jsonl          later runs on this machine take what it finds

Or name them, each forward and backward: --shape "H=12 D=128 L=4680 S=7 mask=teacher_forcing"
                                         --shape "op=gate_residual_adaln C=1536 L=1560 S=21"

Of calls that share an entry of the tables, that of most work decides. Winners are kept after each kernel; called again,
it goes on behind them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ard_kernels.common import tuning
from ard_kernels.common.gpu_support import refuses_device
from ard_kernels.common.tuning import Config
from ard_kernels.tune.calls import Call, read_calls
from ard_kernels.tune.candidates import candidates
from ard_kernels.tune.search import Tuned, describe, plan, text_of, tune_kernel
from ard_kernels.tune.shapes import SHAPES, calls_of_shape


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m ard_kernels.tune", description=__doc__, formatter_class=raw)
    described = "; ".join(f"{op}: {' '.join(shape.defaults)}" for op, shape in SHAPES.items())
    made.add_argument("--shapes", type=Path, metavar="FILE", help="what ARD_RECORD_SHAPES=FILE has recorded")
    made.add_argument("--shape", action="append", default=[], metavar="TEXT", help=f"NAME=VALUE ...; {described}")
    made.add_argument("--ops", nargs="+", metavar="OP", help="of these raw ops alone, and their backward")
    made.add_argument("--seconds-per-kernel", type=float, default=60.0, metavar="SECONDS", help="default: 60")
    made.add_argument("--again", action="store_true", help="also kernels that were tuned before on the same call")
    made.add_argument("--dry-run", action="store_true", help="list kernels and candidates; needs no GPU")
    return made


def chosen_calls(options: argparse.Namespace) -> list[Call]:
    """The calls that the options name.

    Raises:
        ValueError, OSError: there are none, or they cannot be read.
    """
    if not options.shapes and not options.shape:
        raise ValueError("got no shapes; expected --shapes FILE or --shape TEXT")
    if not options.seconds_per_kernel > 0:
        raise ValueError(f"--seconds-per-kernel is {options.seconds_per_kernel}; expected a number > 0")
    calls = read_calls(options.shapes) if options.shapes else []
    for text in options.shape:
        try:
            calls += calls_of_shape(text)
        except ValueError as error:
            raise ValueError(f"--shape {text!r}: {error}") from error
    ops = dict.fromkeys(call.op.removesuffix("_backward") for call in calls)
    for op in options.ops or ():
        if op not in ops:
            raise ValueError(f"--ops has {op!r}; expected some of {', '.join(ops)}")
    return [call for call in calls if call.op.removesuffix("_backward") in (options.ops or ops)]


def gpu() -> torch.device:
    """ValueError where no kernel of ours could run."""
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; expected an NVIDIA GPU (--dry-run needs none)")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := refuses_device(device):
        raise ValueError(f"got {torch.cuda.get_device_name(device)}; expected an NVIDIA GPU: {reason}")
    return device


def tune(
    planned: Mapping[str, Call], device: torch.device, candidates_of: Callable[[str], Iterable[Config]],
    seconds: float, again: bool,
) -> int:  # fmt: skip
    """Tune each kernel on its call and keep the winner; the number of those whose default cannot run."""
    failed = 0
    for key, call in planned.items():
        if not again and tuning.tuned_on(device).get(key) == call.line:
            print(f"{key}: tuned before on {call.label}", flush=True)
            continue
        try:
            tuned = tune_kernel(key, call, candidates_of(key), device, seconds)
        except Exception as error:
            failed += 1
            print(f"{key}: failed on {call.label}: {describe(error)}", flush=True)
            continue
        tuning.keep(device, key, tuned.winner, call.line)
        print(line_of(key, call, tuned), flush=True)
    return failed


def line_of(key: str, call: Call, tuned: Tuned) -> str:
    """What was found, and below it what was refused."""
    times = [tuned.milliseconds[text_of(config)] for config in (tuned.winner, tuned.default)]
    line = f"{key}: {text_of(tuned.winner)} {times[0]:.3f} ms, as shipped {times[1]:.3f} ms ({tuned.gain:.3f}x); "
    line += f"{len(tuned.milliseconds)} timed, {len(tuned.refused)} refused, on {call.label}"
    return "\n".join([line, *(f"  refused {text}: {why}" for text, why in tuned.refused.items())])


def main(
    arguments: Sequence[str] | None = None, device: torch.device | None = None,
    candidates_of: Callable[[str], Iterable[Config]] = candidates,
) -> int:  # fmt: skip
    """Exit status: 1 where a kernel could not be tuned. device: where to tune; by default the current GPU."""
    options = parser().parse_args(arguments)
    try:
        device = device or (None if options.dry_run else gpu())
        calls = chosen_calls(options)
    except (ValueError, OSError) as error:
        parser().error(str(error))
    planned, refused = plan(calls)
    for call, why in refused.items():
        print(f"not tuned: {call.label}: {why}")
    if options.dry_run or device is None:
        for key, call in planned.items():
            print(f"{key}: on {call.label}", *(f"  {text_of(config)}" for config in candidates_of(key)), sep="\n")
        return 0
    failed = tune(planned, device, candidates_of, options.seconds_per_kernel, options.again)
    print(f"{len(planned) - failed} of {len(planned)} kernels tuned: {tuning.cache_file(device)}")
    return 1 if failed or not planned else 0


if __name__ == "__main__":
    sys.exit(main())
