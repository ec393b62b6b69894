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
from benchmarks.history_launches import attention_alone, growing, history_launches, rolling, triton_history
from benchmarks.launches import Binary, Launch, attention_binaries, attention_launch, tile_costs, triton_attention
from benchmarks.markdown import table
from benchmarks.ops import Job, attention_job, gpu_jobs, segment_job
from benchmarks.row_launches import adaln_launch, rope_launch
from benchmarks.sass import Cost, spills
from testing.cases import ADALN, NORM_ROPE, Case

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
    if job.case.op == NORM_ROPE:
        return (rope_launch(job, backend),) * 2  # of q and of k
    return tuple(attention_launch(job.case, binary) for binary in attention_binaries(job.case, job.direction, backend))


WAYS = ("forward", "backward")


def attention_jobs() -> list[Job]:
    """Of gpu_jobs, those of one attention call in 16 bits (a packed projection makes the same launches); then short
    segments, and the frames of a chunk of LongLive 2 as segments."""
    ops = ("block_causal_attention", "segment_attention")
    found = [job for job in gpu_jobs() if job.case.op in ops]
    found += [attention_job(B, L, 72, "M4", way, 1.0) for L in (16, 64) for B in (32, 64) for way in WAYS]
    rates = {"forward": 500.0, "backward": 350.0}
    return found + [segment_job((880,) * 8, "block-causal", way, 1.1, rates[way], H=24, D=128) for way in WAYS]


def row_jobs() -> list[Job]:
    """Of gpu_jobs, the adaLN family with rows in fp32 and a LayerNorm, and qk_norm_rope."""

    def wanted(case: Case) -> bool:
        return case.op == NORM_ROPE or (case.op in ADALN and case.row_dtype.itemsize == 4 and case.norm == "layer")

    return [job for job in gpu_jobs() if wanted(job.case)]


def by_case(jobs: Iterable[Job]) -> list[list[Job]]:
    """Forward and backward of each case."""
    found: dict[Case, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.case, []).append(job)
    return list(found.values())


# Tables


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-5 else f"{1e6 * seconds:.1f}"


def cell(launches: Iterable[Launch]) -> str:
    """Microseconds at least of launches one after the other, and what binds them."""
    bounds = [bound(launch) for launch in launches]
    binds = ", ".join(dict.fromkeys(name for _, name in bounds))
    return f"{micro(sum(seconds for seconds, _ in bounds))} {binds}"


def seconds_of(launches: Iterable[Launch]) -> float:
    return sum(bound(launch)[0] for launch in launches)


def targets(values: Iterable[float | None], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values if value is not None)


def header(first: str, columns: Sequence[str], last: str) -> list[str]:
    """The columns for each backend and direction; the first of them is named after these."""
    ways = [f"{name} {way}" for name in ("Triton", "CUDA") for way in WAYS]
    return [first, *(column for way in ways for column in (f"{way}, us at least", *columns)), last]


def short(case: Case) -> str:
    """A shape in few words."""
    if case.op in ADALN:
        return f"{case.op}{f', {case.seam}' if case.seam else ''}, C {case.C}, {case.B * case.tokens} tokens"
    if case.op == NORM_ROPE:
        return f"{case.op} over {case.over}, H {case.H}, D {case.D}, {case.B * case.tokens} tokens"
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
            for way in WAYS:
                job = attention_job(32, 256, D, "M4", way, 1.0)
                rows += [kernel_row(binary, D) for binary in attention_binaries(job.case, way, backend)]
    units = [*LIMITS[:4], "binds", "issue, masked", "issue, program", "issued / useful"]
    return table(["kernel", "D", "tile", "blocks", *units], rows)


def attention() -> str:
    """Per call: the bound, what binds its launches, and the rate that follows beside the target."""
    rows = []
    for jobs in by_case(attention_jobs()):
        row: list[object] = [short(jobs[0].case)]
        for backend in BACKENDS:
            for job in jobs:
                launches = job_launches(job, backend)
                row += [cell(launches), f"{job.rate(1e3 * seconds_of(launches)):.0f}"] if launches else ["", ""]
        rows.append([*row, targets((job.rate_target for job in jobs), 0)])
    return table(header("attention", ["TFLOP/s"], "targets"), rows)


def rows_of_tokens() -> str:
    """Per call: the bound, and the share of the HBM's rate that it leaves."""
    rows = []
    for jobs in by_case(row_jobs()):
        row: list[object] = [short(jobs[0].case)]
        for backend in BACKENDS:
            for job in jobs:
                launches = job_launches(job, backend)
                floor = job.op.work(job.case, job.direction)[1] / chip.HBM_BYTES[CHIP]
                issue = sum(limits(launch)["issue"] for launch in launches)
                row += [cell(launches), micro(issue), f"{floor / seconds_of(launches):.2f}"]
        rows.append([*row, targets((job.fraction_target for job in jobs), 2)])
    return table(header("op", ["issue", "of HBM"], "targets"), rows)


RING = Case("history_attention", 1, (4680,), H=12, D=128)  # with a window of 7 and a sink of 3


def history_row(name: str, flops: int, launches: Sequence[list[Launch]]) -> list[object]:
    """launches: of each backend."""
    row: list[object] = [name]
    for each in launches:
        parts = {part: seconds_of(launch for launch in each if launch.name == part) for part in ("append", "splits")}
        beside = ", ".join(f"{part} {micro(seconds)}" for part, seconds in parts.items() if seconds)
        row += [cell(each), beside, f"{flops / seconds_of(each) / 1e12:.0f}"]
    return row


def history() -> str:
    """All steps of a sampler of four segments; a step of an endless stream, and its attention without a cache."""
    rows = []
    for case in (job.case for job in gpu_jobs() if job.case.op == "history_attention"):
        steps = growing(case)
        launches = [[one for step in steps for one in history_launches(step, backend)] for backend in BACKENDS]
        rows.append(history_row(f"4 steps, {short(case)}", sum(step.flops for step in steps), launches))
    step = rolling(RING, 7, 3)
    whole = f"4680 x {sum(step.past) + step.length}, D 128, H 12"
    rows.append(history_row(f"rolling, {whole}", step.flops, [history_launches(step, name) for name in BACKENDS]))
    alone = [[attention_alone(step, name)] for name in BACKENDS]
    rows.append(history_row(f"attention alone, {whole}", step.flops, alone))
    columns = [f"{name}, {column}" for name in ("Triton", "CUDA") for column in ("us at least", "of it", "TFLOP/s")]
    return table(["history attention", *columns], rows)


TILES = ((128, 64, 8, 3), (128, 128, 8, 2))


def tile_row(values: Sequence[int], D: int, binary: Binary, launch: Launch) -> list[object]:
    each, (seconds, binds) = limits(launch), bound(launch)
    spilled = spills(binary.flow.instructions(range(len(binary.flow.blocks))))
    return [
        binary.name, D, "{} x {}, {} warps, {} stages".format(*values), binary.resident,
        *(micro(each[name]) for name in LIMITS[:5]), binds, micro(seconds), spilled or "",
    ]  # fmt: skip


def tiles() -> str:
    """Alternatives of Triton's tiles at the model's own shape; of history attention at a rolling step."""
    rows, step = [], rolling(RING, 7, 3)

    def constants_(values: Sequence[int]) -> tuple[tuple[str, int], ...]:
        return tuple(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))

    for D in (72, 128):
        case = attention_job(32, 256, D, "M4", "forward", 1.0).case
        for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkv"):
            for values in TILES:
                binary = triton_attention(kernel, case.lengths, case.mask, case.op, (16, 16), D, constants_(values))
                rows.append(tile_row(values, D, binary, attention_launch(case, binary)))
    for values in ((64, 64, 4, 3), *TILES):
        binary = triton_history(step, False, constants_(values))
        rows.append(tile_row(values, RING.D, binary, history_launches(step, "triton", constants_(values))[0]))
    return table(["kernel", "D", "tile", "blocks", *LIMITS[:5], "binds", "us at least", "spilling instructions"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "constants": constants, "versions": versions, "kernels": kernels, "attention": attention, "history": history,
    "rows": rows_of_tokens, "tiles": tiles,
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
