"""`make predictions`: the least time of each launch on a Hopper GPU, from compiled kernels and tile schedules.

    python -m benchmarks.predict            compile, count, refresh the blocks `<!-- prediction: NAME -->` of
                                            docs/predictions.md
    python -m benchmarks.predict --check    write nothing; fail where a block differs

No kernel runs. A launch's bound is the longest of six times: matrix products, exponentials, instructions issued,
shared memory, L2 and HBM, each as if it alone were busy, at the rates of chip.py. A launch cannot be faster, if these
rates are right; how much slower it is, latency, barriers and dependencies decide, which nothing here knows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import metadata

from benchmarks import chip
from benchmarks.cuda_objects import nvcc
from benchmarks.files import ROOT
from benchmarks.launches import Binary, Launch, attention_binaries, attention_launch, tile_costs, triton_attention
from benchmarks.markdown import table
from benchmarks.ops import Job, attention_job, gpu_jobs
from benchmarks.row_launches import adaln_launch
from benchmarks.sass import Cost, spills
from testing.cases import ADALN

DOCUMENT = ROOT / "docs" / "predictions.md"
BLOCK = re.compile(r"(<!-- prediction: (\w+) -->\n).*?(<!-- end of prediction -->)", re.DOTALL)
CHIP = "H200"
BACKENDS = ("triton", "cuda")
LIMITS = ("tensor", "exp2", "issue", "shared", "L2", "HBM")


def on_multiprocessor(amounts: Cost) -> dict[str, float]:
    """Cycles of a multiprocessor in which each of its units is busy."""
    warp = {name: getattr(amounts, name) / chip.SCHEDULERS for name in ("tensor", "exp2", "issue")}
    return warp | {"shared": amounts.shared}


def limits(launch: Launch) -> dict[str, float]:
    """Seconds that a launch takes at least, by what limits it."""
    share = chip.MULTIPROCESSORS * launch.busy * chip.CLOCK
    on_chip = {name: cycles / share for name, cycles in on_multiprocessor(launch.amounts).items()}
    l2, hbm = launch.l2_bytes / (chip.L2_BYTES * chip.CLOCK), launch.hbm_bytes / chip.HBM_BYTES[CHIP]
    return on_chip | {"L2": l2, "HBM": hbm}


def bound(launch: Launch) -> tuple[float, str]:
    """(seconds, what binds)"""
    return max((seconds, name) for name, seconds in limits(launch).items())


@cache
def job_launches(job: Job, backend: str) -> tuple[Launch, ...]:
    """The launches of one call; none where the backend does not serve it."""
    if job.case.op in ADALN:
        return (adaln_launch(job, backend),)
    return tuple(attention_launch(job.case, binary) for binary in attention_binaries(job.case, job.direction, backend))


def attention_jobs() -> list[Job]:
    """Of gpu_jobs, those of one attention call in 16 bits; a packed projection makes the same launches."""
    ops = ("block_causal_attention", "segment_attention")
    return [job for job in gpu_jobs() if job.case.op in ops]


def adaln_jobs() -> list[Job]:
    return [job for job in gpu_jobs() if job.case.op in ADALN and job.case.row_dtype.itemsize == 4]


# Tables


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-5 else f"{1e6 * seconds:.1f}"


def short(job: Job) -> str:
    """A job's shape in few words."""
    case = job.case
    if case.op in ADALN:
        return f"{case.op}{f', {case.seam}' if case.seam else ''}, C {case.C}, {case.B * case.tokens} tokens"
    count = len(case.lengths)
    equal = len(set(case.lengths)) == 1
    tokens = f"{count} x {case.lengths[0]}" if equal else " + ".join(map(str, case.lengths))
    heads = f"H {case.H}" + (f":{case.kv_heads}" if case.kv_heads else "")
    return f"D {case.D}, {tokens}, B {case.B}, {heads}, {case.mask}"


def compilers() -> str:
    """Versions that the numbers of the blocks hold for."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"V(\d+\.\d+\.\d+)", said)[1]
    return f"Triton {metadata.version('triton')}, nvcc {number}"


def constants() -> str:
    rows = [
        ("multiprocessors; clock", f"{chip.MULTIPROCESSORS}; {chip.CLOCK / 1e9:.2f} GHz"),
        ("warp instructions issued, per multiprocessor and cycle", chip.SCHEDULERS),
        ("bf16 FLOPs of wgmma; of mma.sync", f"{chip.TENSOR_FLOPS}; {chip.MMA_SYNC_SHARE:.2f} of that"),
        ("exponentials", chip.EXP2),
        ("bytes of shared memory and L1", chip.SHARED_BYTES),
        ("bytes of L2, per cycle, the chip", chip.L2_BYTES),
        ("bytes of HBM, per second", ", ".join(f"{name} {rate / 1e12} TB/s" for name, rate in chip.HBM_BYTES.items())),
    ]
    return table(["what", "at most"], rows)


def versions() -> str:
    return f"Kernels of {compilers()}."


def kernel_row(binary: Binary, D: int) -> list[object]:
    costs = tile_costs(binary, D)
    cycles = on_multiprocessor(costs.full)
    binds = max(cycles, key=lambda name: cycles[name])
    rows, columns = binary.block
    useful = 2 * rows * columns * D * binary.products.matmuls
    return [
        binary.name, D, f"{rows} x {columns}", binary.resident, *(round(value) for value in cycles.values()),
        binds, *(round(on_multiprocessor(part)["issue"]) for part in (costs.masked, costs.program)),
        f"{costs.flops / useful:.3f}",
    ]  # fmt: skip


def kernels() -> str:
    """Per tile, of the kernels at the widths of the models."""
    rows = []
    for D in (64, 72, 128):
        for backend in BACKENDS:
            for way in ("forward", "backward"):
                job = attention_job(32, 256, D, "M4", way, 1.0)
                rows += [kernel_row(binary, D) for binary in attention_binaries(job.case, way, backend)]
    header = [
        "kernel",
        "D",
        "tile",
        "blocks",
        *LIMITS[:4],
        "binds",
        "issue, masked",
        "issue, program",
        "issued / useful",
    ]
    return table(header, rows)


def attention() -> str:
    """Per call: the bound, what binds each launch, and the rate that follows beside the target."""
    rows = []
    for job in attention_jobs():
        row: list[object] = [short(job), job.direction]
        for backend in BACKENDS:
            launches = job_launches(job, backend)
            if not launches:
                row += ["", "", ""]
                continue
            seconds = sum(bound(launch)[0] for launch in launches)
            row += [
                micro(seconds),
                ", ".join(bound(launch)[1] for launch in launches),
                f"{job.rate(1e3 * seconds):.0f}",
            ]
        rows.append([*row, "" if job.rate_target is None else f"{job.rate_target:.0f}"])
    header = ["attention", "direction"]
    for name in ("Triton", "CUDA"):
        header += [f"{name}: us at least", "binds", "TFLOP/s at most"]
    return table([*header, "target"], rows)


def adaln() -> str:
    """Per call: the bound, and the share of the HBM's rate that it leaves."""
    rows = []
    for job in adaln_jobs():
        row: list[object] = [short(job), job.direction]
        for backend in BACKENDS:
            (launch,) = job_launches(job, backend)
            seconds, binds = bound(launch)
            floor = job.op.work(job.case, job.direction)[1] / chip.HBM_BYTES[CHIP]
            row += [micro(seconds), binds, micro(limits(launch)["issue"]), f"{floor / seconds:.2f}"]
        rows.append([*row, f"{job.fraction_target:.2f}"])
    header = ["adaLN", "direction"]
    for name in ("Triton", "CUDA"):
        header += [f"{name}: us at least", "binds", "issue", "share of HBM"]
    return table([*header, "target"], rows)


TILES = ((128, 64, 8, 3), (128, 128, 8, 2))


def tiles() -> str:
    """Alternatives of Triton's tiles at the model's own shape."""
    rows = []
    for D in (72, 128):
        case = attention_job(32, 256, D, "M4", "forward", 1.0).case
        for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkv"):
            for values in TILES:
                constants_ = tuple(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))
                binary = triton_attention(kernel, case.lengths, case.mask, case.op, (16, 16), D, constants_)
                launch = attention_launch(case, binary)
                each, (seconds, binds) = limits(launch), bound(launch)
                spilled = spills(binary.flow.instructions(range(len(binary.flow.blocks))))
                rows.append([
                    binary.name, D, "{} x {}, {} warps, {} stages".format(*values), binary.resident,
                    *(micro(each[name]) for name in LIMITS[:5]), binds, micro(seconds), spilled or "",
                ])  # fmt: skip
    return table(["kernel", "D", "tile", "blocks", *LIMITS[:5], "binds", "us at least", "spilling instructions"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "constants": constants, "versions": versions, "kernels": kernels, "attention": attention, "adaln": adaln,
    "tiles": tiles,
}  # fmt: skip


def refreshed(text: str, names: Iterable[str] = BLOCKS) -> str:
    """`text` with the blocks of these names made anew; one of unknown name raises."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"benchmarks.predict: block {name!r}; expected one of {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name]()}\n{end}" if name in names else match[0]

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block differs")
    parser.add_argument("--only", nargs="*", choices=BLOCKS, default=list(BLOCKS), help="blocks to make anew")
    options = parser.parse_args(arguments)
    before = DOCUMENT.read_text()
    after = refreshed(before, options.only)
    if options.check:
        print(f"docs/predictions.md {'is out of date' if after != before else 'agrees with the kernels'}")
        return int(after != before)
    DOCUMENT.write_text(after)
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
