"""`make aot`: compile every Triton kernel with every shipped configuration, without a GPU, and check what came out.

    python -m benchmarks.aot            compile what FEW names for sm_80, sm_90 and sm_100, check, compare with the
                                        committed tables; exit 1 if anything is off
    python -m benchmarks.aot --all      every shipped configuration of every architecture: minutes
    python -m benchmarks.aot --update   the same, and write the tables (benchmarks/results/aot/sm*.csv)

Kernels are compiled through the backends' own launch code on CPU tensors: Triton's driver is replaced by one that names
the target and launches nothing, so arguments, alignment and constants are specialised as in a real call.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ard_kernels.block_causal_attention import triton_impl as attention
from ard_kernels.block_causal_attention.spec import block_causal, empty_output
from ard_kernels.block_causal_attention.tiles import column_tiles, make_tables
from ard_kernels.common import tuning
from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.history_attention import triton_impl as history
from ard_kernels.history_attention.places import Place
from ard_kernels.history_attention.splits import workspace_elements
from ard_kernels.qk_norm_rope import op as norm_rope
from ard_kernels.qk_norm_rope.spec import Rule, empty_statistics
from ard_kernels.segment_adaln import op as adaln
from benchmarks import build_tables
from benchmarks.triton_objects import keep_reports, ptxas_report, tcgen05_flops, tensor_core_flops

TABLES = Path(__file__).parent / "results" / "aot"
# Bytes of shared memory a block may have and a multiprocessor holds (CUDA programming guide, compute capabilities).
SHARED = {
    80: (163 << 10, 164 << 10),
    86: (99 << 10, 100 << 10),
    90: (227 << 10, 228 << 10),
    100: (227 << 10, 228 << 10),
}
THREADS = {80: 2048, 86: 1536, 90: 2048, 100: 2048}
WIDE_ACCESS = (
    r"(?:ld|st)\.global(?:\.\w+)*\.v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10|ld\.global[\w.:]*\.v2\.b64"
)
# What is compiled without --all: D = 72 and 128 in 16 bits, D = 72 in fp32, rows of 1152; the kernels are the same for
# other widths, and on sm_86 their PTX is that of sm_80. sm_100 takes twice the time of others: what differs most there.
MAIN = (
    r"attention_\w+/16bit/(72|128)/long|attention_\w+/32bit/72/long|adaln_\w+/\d+bit/1152/long"
    r"|rope_\w+/\d+bit/2048/long"
)
FEW = {80: MAIN, 90: MAIN, 100: r"attention_forward/16bit/(72|128)/long|attention_backward_dkv/16bit/72/long"}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Spills that were looked at and let pass, with the reason: (architecture, kernel, key) -> bytes.
SPILL_BUDGET = {
    # dK and dV of 64 x 256 in fp32 are 128 of a thread's 255 registers; without boundary tiles nothing spills, and
    # smaller tiles would leave wgmma, whose step is 64 rows.
    (90, "backward_dkv", "attention_backward_dkv/16bit/256/short"): 256,
    (90, "backward_dkv", "attention_backward_dkv/16bit/256/long"): 256,
    # Four registers, where tiles are masked; what does not spill leaves one block on a multiprocessor instead of three.
    (86, "backward_dq", "attention_backward_dq/16bit/72/short"): 16,
    # Two registers, where tiles are masked; half the tile would be the price for tiles that are not.
    (80, "forward", "attention_forward/32bit/256/long"): 8,
    (90, "forward", "attention_forward/32bit/32/long"): 8,
    (90, "forward", "attention_forward/16bit/256/long"): 8,
    # Only with --regAllocOptLevel=2, which Triton 3.7 passes to ptxas. Chosen without it; a GPU has to tell the best.
    (100, "forward", "attention_forward/16bit/64/long"): 28,
    (100, "forward", "attention_forward/16bit/96/long"): 8,
    (100, "forward", "attention_forward/16bit/128/short"): 8,
    (100, "forward", "attention_forward/16bit/256/long"): 92,
    (100, "backward_dq", "attention_backward_dq/16bit/64/short"): 8,
    (100, "backward_dq", "attention_backward_dq/16bit/96/long"): 44,
    (100, "backward_dq", "attention_backward_dq/32bit/192/long"): 28,
    (100, "backward_dkv", "attention_backward_dkv/16bit/64/short"): 32,
    (100, "append_and_attend", "attention_history/16bit/256/short"): 72,
    (100, "append_and_attend", "attention_history/16bit/256/long"): 72,
    (100, "backward", "adaln_backward/32bit/8192/long"): 40,
    (100, "forward", "adaln_forward/16bit/1152/long"): 8,  # the RMSNorm's variant alone
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel: what `make aot` prints, checks and commits."""

    kernel: str
    key: str
    variant: str
    constants: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    tensor_core_ops: int
    wide_accesses: int
    issued_over_useful: str


class _Target:
    """A stand-in for Triton's CUDA driver that names a target and has no device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels per device: one per target here

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(
    run: Callable[[], object], wanted: set[str], arch: int, constants: dict[str, int]
) -> list[tuple[str, object, dict]]:
    """(kernel, compiled kernel, constants) of each launch of a wanted kernel in `run`: compiled, not launched."""
    keep_reports()
    driver.set_active(_Target(arch))
    launches, original_run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__.strip("_")
        if name in wanted:
            launches.append((name, original_run(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    JITFunction.run = compile_only
    try:
        with tuning.override(dict.fromkeys(FUNCTIONS, constants)):
            run()
    finally:
        JITFunction.run = original_run
    return launches


# What to run for a key


def head_dim(key: str) -> int:
    """The head dim to compile an attention entry at: its own, but 160 for the one that serves 136 to 192."""
    width = int(key.split("/")[2])
    return 160 if width == 192 else width


def _attention_run(kernel: str, bits: int, D: int, L: int, kv_heads: int) -> Callable[[], object]:
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    q, k, v = (x.transpose(1, 2) for x in torch.empty(1, 2 * L, 3, 2, D, dtype=dtype).unbind(2))
    k, v, segments = k[:, :kv_heads], v[:, :kv_heads], block_causal([L], None, 0)
    if kernel == "attention_history":
        cache = torch.empty(2, 1, 2, 4 * L, D, dtype=dtype).unbind(0)
        segment = [x[:, :, :L] for x in (q, k, v)]
        workspace = torch.empty(workspace_elements(D, q.device))
        return lambda: history.forward(
            *segment, *cache, empty_output(segment[0]), workspace, Place(L, (0, 0), (0, 2 * L)), 0.1
        )
    out, lse = empty_output(q), torch.empty(1, 2, 2 * L)
    if kernel == "attention_forward":
        return lambda: attention.forward(q, k, v, out, lse, segments, 0.1)
    return lambda: attention.backward(out, None, q, k, v, out, lse, q, k, v, segments, 0.1)


ADALN_VARIANTS = ("segment", "token", "affine", "rms", "affine token")
WIDEST_AFFINE = 6144  # of the models that have a weight; at 8192 some of these variants spill, 108 bytes at most


def _adaln_run(kernel: str, bits: int, C: int, variant: str) -> Callable[[], object]:
    """gate_residual_adaln, which has everything that the family's other ops have; all gradients."""
    dtype, T, norm = torch.bfloat16 if bits == 16 else torch.float32, 512, "rms" if variant == "rms" else "layer"
    x, per_token = torch.empty(1, T, C, dtype=dtype), "token" in variant
    gate, shift, scale = torch.empty(1, T if per_token else 2, 3 * C).chunk(3, -1)
    weight = None if variant in ("segment", "token") else torch.empty(C)
    bias = weight if "affine" in variant else None
    lengths = [1] if per_token else [T // 2]
    if kernel == "adaln_forward":
        settings = lengths, norm, NORM_EPS, dtype, "triton"
        return lambda: adaln.adaln_op(x, x, gate, shift, scale, weight, bias, *settings)
    rstd = torch.empty(1, T)
    saved = x, x, gate, scale, weight, bias, rstd if norm == "layer" else None, rstd
    wanted = [True, True, True, weight is not None, bias is not None]
    return lambda: adaln.backward_op(x, x, *saved, lengths, torch.float32, wanted, "triton")


ROPE_VARIANTS = {  # over all heads, pairs (i, i + P), a table for each head, norm, head dim
    "wan": (True, False, False, "rms", 128),
    "ltx": (True, True, True, "rms", 64),
    "head": (False, False, False, "rms", 72),
    "layer": (False, True, False, "layer", 64),
    "turn": (False, False, False, "none", 72),
}


def _rope_run(kernel: str, bits: int, channels: int, variant: str) -> Callable[[], object]:
    """q of a packed projection, with all that its norm may have; H * D up to `channels`, the heads no power of two."""
    over_all, half, per_head, norm, D = ROPE_VARIANTS[variant]
    dtype, T, H = torch.bfloat16 if bits == 16 else torch.float32, 64, 2 ** int(math.log2(channels / D)) - 1
    q = torch.empty(1, T, 3, H, D, dtype=dtype)[:, :, 0].transpose(1, 2)
    parameter = None if norm == "none" else torch.empty(H * D if over_all else D)
    table = torch.empty(1, T, H if per_head else 1, D // 2)
    inputs = (parameter, None, parameter if norm == "layer" else None, None, table, table)
    rule = norm, over_all, half, NORM_EPS, "triton"
    if kernel == "rope_forward":
        return lambda: norm_rope.forward(q, *inputs, *rule)
    mean, rstd = empty_statistics(q, Rule(*rule[:4]))
    return lambda: norm_rope.backward(q, q, *inputs, mean, rstd, *rule)


def cases(key: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, run). Attention: full tiles only, boundary tiles too, and the same with heads of keys that two of
    queries share, where a kernel goes through both. adaLN: rows per segment, and per token, both without weight and
    bias and with them, and an RMSNorm. qk_norm_rope: ROPE_VARIANTS.
    """
    kernel, bits, width, length = key.split("/")
    bits = int(bits.removesuffix("bit"))
    if kernel.startswith("adaln"):
        for variant in ADALN_VARIANTS:
            C = int(width) if variant in ("segment", "token") else min(int(width), WIDEST_AFFINE)
            yield variant, _adaln_run(kernel, bits, C, variant)
        return
    if kernel.startswith("rope"):
        for variant in ROPE_VARIANTS:
            yield variant, _rope_run(kernel, bits, int(width), variant)
        return
    full, ragged = (64, 40) if length == "short" else (256, 200)
    for variant, L, kv_heads in (("full", full, 2), ("masked", ragged, 2), ("grouped", ragged, 1)):
        if variant != "grouped" or kernel == "attention_backward_dkv":
            yield variant, _attention_run(kernel, bits, head_dim(key), L, kv_heads)


FUNCTIONS = {  # kernels of a key, by the name of the function
    "attention_forward": {"forward"},
    "attention_backward_dq": {"backward_dq"},
    "attention_backward_dkv": {"backward_dkv"},
    "attention_history": {"append_and_attend", "add_splits"},
    "adaln_forward": {"forward"},
    "adaln_backward": {"backward", "add_chunks", "add_parameters"},
    "rope_forward": {"forward"},
    "rope_backward": {"backward", "add_programs"},
}


# What came out


MATMULS = {"forward": 2, "backward_dq": 3, "backward_dkv": 4, "append_and_attend": 2}


def _issued_over_useful(name: str, asm: dict, options: dict, key: str, arch: int) -> str:
    """Tensor-core FLOPs issued over useful ones for full tiles of whole segments; blank where the text cannot tell.

    Per tile: the loop of a kernel without masked tiles is the only place with matrix instructions. Over tiles: those
    that the schedule of DiT-XL/2's segments visits, against the pairs of the mask.
    """
    D = head_dim(key)
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    flops = tcgen05_flops(asm["ttgir"]) if arch == 100 else tensor_core_flops(asm["ptx"], options["num_warps"])
    if not flops or name == "append_and_attend":  # two loops there: cache and own segment
        return ""
    per_tile = flops / (2 * block_m * block_n * D * MATMULS[name])
    segments = block_causal([256], None, 0)
    items = make_tables(segments, 1024, 1024, block_m, block_n, name == "backward_dkv").items
    return f"{per_tile * column_tiles(items).sum() * block_m * block_n / (10 * 256 * 256):.3f}"


def inspect(name: str, kernel, options: dict, key: str, variant: str, arch: int) -> tuple[Row, bool]:
    """The table row, and whether ptxas had to serialise wgmma."""
    ptx = kernel.asm["ptx"]
    registers, spilled, serialised = ptxas_report(kernel.metadata.ptxas)
    shared = kernel.metadata.shared
    per_sm = build_tables.blocks_per_sm(registers, 32 * options["num_warps"], THREADS[arch])
    per_sm = min(per_sm, SHARED[arch][1] // (shared + 1024))
    constants = " ".join(f"{c}={options[c]}" for c in ("BLOCK_M", "BLOCK_N", "ROWS", "STAGES") if c in options)
    ratio = _issued_over_useful(name, kernel.asm, options, key, arch) if variant == "full" and name in MATMULS else ""
    tensor_core_ops = len(re.findall(re.escape(TENSOR_CORES[arch]) + r"\b", ptx))
    row = Row(
        name, key, variant, constants, options["num_warps"], options.get("num_stages", 3),
        registers, spilled, shared, per_sm, tensor_core_ops, len(re.findall(WIDE_ACCESS, ptx)), ratio,
    )  # fmt: skip
    return row, serialised


def problems(row: Row, serialised: bool, arch: int) -> list[str]:
    """What a shipped configuration must not do."""
    found = []
    if row.spill_bytes > SPILL_BUDGET.get((arch, row.kernel, row.key), 0):
        found.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > SHARED[arch][0]:
        found.append(f"{row.shared_bytes} bytes of shared memory; the limit is {SHARED[arch][0]}")
    if row.blocks_per_sm < 1:
        found.append(f"{row.registers} registers x {32 * row.warps} threads do not fit")
    if (
        row.variant in ("full", "masked", "grouped")
        and row.kernel in MATMULS
        and "/16bit/" in row.key
        and not row.tensor_core_ops
    ):
        found.append(f"no {TENSOR_CORES[arch]}")
    if not row.wide_accesses and row.kernel not in ("add_splits", "add_chunks", "add_parameters", "add_programs"):
        found.append("no 16-byte accesses of global memory")
    if serialised:
        found.append("wgmma serialised")
    if row.issued_over_useful and "/72/" in row.key and float(row.issued_over_useful) > 1.15:
        found.append(f"issues {row.issued_over_useful} of the useful tensor-core FLOPs; at most 1.15 at D = 72")
    return found


def compile_key(arch: int, key: str, constants: dict[str, int]) -> tuple[int, list[Row], list[str]]:
    """All kernels of one configuration: (arch, rows, problems)."""
    rows, found = [], []
    for variant, run in cases(key):
        try:
            launches = compiled_by(run, FUNCTIONS[key.split("/")[0]], arch, constants)
        except Exception as error:  # whatever the compiler raises is this configuration's problem
            return arch, rows, [f"sm{arch} {key} {variant}: {type(error).__name__}: {error}"]
        for name, kernel, options in launches:
            row, serialised = inspect(name, kernel, options, key, variant, arch)
            rows.append(row)
            found += [f"sm{arch} {name} {key} {variant}: {p}" for p in problems(row, serialised, arch)]
    return arch, list(dict.fromkeys(rows)), found  # a kernel may be launched twice, for weight and for bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every key of every architecture")
    parser.add_argument("--update", action="store_true", help="every key, and write the tables")
    parser.add_argument("--arch", type=int, nargs="*", choices=tuning.ARCHITECTURES)
    options = parser.parse_args()
    everything = options.all or options.update
    architectures = options.arch or (tuning.ARCHITECTURES if everything else tuple(FEW))
    work = [
        (arch, key, constants)
        for arch in sorted(architectures, reverse=True)  # the slowest first
        for key, constants in tuning.shipped(arch).items()
        if everything or re.fullmatch(FEW.get(arch, MAIN), key)
    ]
    compiler = f"triton {metadata.version('triton')}"
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(compile_key, *zip(*work, strict=True)))
    failures = []
    for arch in architectures:
        rows, path = [row for at, part, _ in results if at == arch for row in part], TABLES / f"sm{arch}.csv"
        build_tables.show(f"sm_{arch}", Row, rows)
        failures += [problem for at, _, found in results if at == arch for problem in found]
        if options.update:
            build_tables.write(path, compiler, Row, rows)
        elif build_tables.compiler_of(path) != compiler:
            failures.append(f"{path.name} is of {build_tables.compiler_of(path)}, this is {compiler}; see --update")
        else:
            keys = {key for at, key, _ in work if at == arch}
            failures += build_tables.differences(
                path, rows, ("kernel", "key", "variant"), lambda line, keys=keys: everything or line["key"] in keys
            )
    print(f"\n{sum(len(part) for _, part, _ in results)} kernels compiled, {len(failures)} problems")
    for failure in failures:
        print(f"  {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
